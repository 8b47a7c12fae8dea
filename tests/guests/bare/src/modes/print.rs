//! Much output, for those who must not lose any of it.

use crate::boot::Boot;

/// Prints `lines=` lines of 64 characters, each with its number in front, or as many times
/// `line=`, and lets the guest end at once.
pub fn run(boot: &Boot) {
    let text = boot.cmdline.get("line");
    for line in 0..boot.cmdline.number("lines", 1000) {
        match text {
            Some(text) => say!("{text}"),
            None => say!("{line:08} {:.<54}", ""),
        }
    }
}
