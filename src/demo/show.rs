//! What the demo prints.

use super::DemoError;
use crate::control::protocol::Process;

/// One line of the table at the end.
pub(super) struct Row {
    what: &'static str,
    value: String,
}

impl Row {
    pub(super) fn new(what: &'static str, value: String) -> Row {
        Row { what, value }
    }
}

pub(super) fn step(title: &str) {
    println!("\n== {title}");
}

pub(super) fn say(text: &str) {
    println!("   {text}");
}

pub(super) fn console(line: &str) {
    println!("   | {line}");
}

pub(super) fn bad(text: String) -> DemoError {
    DemoError::Wrong(text)
}

pub(super) fn table(rows: &[Row]) {
    let width = rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
    println!("measured");
    for row in rows {
        println!("  {:<width$}  {}", row.what, row.value);
    }
}

pub(super) fn processes(processes: &[Process]) {
    println!(
        "   {:<8} {:<6} {:>7} {:>10} {:>7} {:>12} {:>10}",
        "role", "id", "pid", "uid", "seccomp", "capabilities", "memory"
    );
    for p in processes {
        println!(
            "   {:<8} {:<6} {:>7} {:>10} {:>7} {:>12} {:>6} KiB",
            p.role,
            p.id,
            p.pid,
            p.uid,
            if p.seccomp == 2 { "filter" } else { "none" },
            match p.cap_eff.0.count_ones() {
                0 => "none".to_string(),
                n => n.to_string(),
            },
            p.pss_kib
        );
    }
}
