//! Policy files: what they may say, and how includes and constants are resolved.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::syscalls;

/// One policy file, as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    allow: Vec<AllowGroup>,
    #[serde(default)]
    refuse: Vec<RefuseGroup>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AllowGroup {
    why: String,
    calls: Vec<String>,
    /// All of these must hold.
    #[serde(default)]
    when: Vec<ConditionText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefuseGroup {
    why: String,
    calls: Vec<String>,
    errno: String,
}

/// A condition on one argument; exactly one of the four tests is given.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConditionText {
    arg: u8,
    /// All these bits are set.
    set: Option<Vec<String>>,
    /// All these bits are clear.
    clear: Option<Vec<String>>,
    /// Equal to one of these.
    one_of: Option<Vec<String>>,
    /// Unsigned and not below this.
    at_least: Option<String>,
    /// Compare 64 bits instead of the 32 the kernel uses for an `int`.
    #[serde(default)]
    wide: bool,
}

/// A condition with its constants resolved.
#[derive(Clone)]
pub struct Condition {
    pub arg: u8,
    pub wide: bool,
    pub test: Test,
}

#[derive(Clone)]
pub enum Test {
    Set(u64),
    Clear(u64),
    OneOf(Vec<u64>),
    AtLeast(u64),
}

/// A policy with everything it includes.
#[derive(Default)]
pub struct Policy {
    /// Alternatives of conditions per call, in the order of the files; an empty
    /// list of alternatives allows the call with any arguments.
    pub allow: BTreeMap<i64, Vec<Vec<Condition>>>,
    /// Calls answered with an errno: always, or where the conditions under which
    /// they are allowed do not hold.
    pub refuse: BTreeMap<i64, u32>,
}

/// Reads `constants.json`.
pub fn constants(folder: &Path) -> Result<BTreeMap<String, u64>, String> {
    let path = folder.join("constants.json");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let raw: BTreeMap<String, String> =
        serde_json::from_str(&text).map_err(|e| format!("constants.json: {e}"))?;
    raw.into_iter()
        .map(|(name, value)| {
            let digits = value
                .strip_prefix("0x")
                .ok_or_else(|| format!("constants.json: {name}: write it as 0x…"))?;
            let value = u64::from_str_radix(digits, 16)
                .map_err(|e| format!("constants.json: {name}: {e}"))?;
            Ok((name, value))
        })
        .collect()
}

/// Reads policy `name` and all it includes.
pub fn resolve(
    folder: &Path,
    name: &str,
    constants: &BTreeMap<String, u64>,
) -> Result<Policy, String> {
    let mut policy = Policy::default();
    add(folder, name, constants, &mut policy, &mut BTreeSet::new())?;
    for call in policy.refuse.keys() {
        if policy.allow.get(call).is_some_and(Vec::is_empty) {
            let call = syscalls::name(*call).unwrap_or("?");
            return Err(format!("{name}.json: {call} is refused, and allowed with any arguments"));
        }
    }
    Ok(policy)
}

fn add(
    folder: &Path,
    name: &str,
    constants: &BTreeMap<String, u64>,
    policy: &mut Policy,
    seen: &mut BTreeSet<String>,
) -> Result<(), String> {
    if !seen.insert(name.to_string()) {
        return Ok(());
    }
    let path = folder.join(format!("{name}.json"));
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let file: File = serde_json::from_str(&text).map_err(|e| format!("{name}.json: {e}"))?;
    let within = |e: String| format!("{name}.json: {e}");
    if file.about.is_empty() {
        return Err(within("`about` is empty".into()));
    }
    // The file's own rules first: a policy puts its most frequent call first.
    for group in file.allow {
        let conditions = group
            .when
            .iter()
            .map(|c| condition(c, constants))
            .collect::<Result<Vec<_>, _>>()
            .map_err(within)?;
        for call in numbers(&group.calls, &group.why).map_err(within)? {
            allow(policy, call, &conditions).map_err(within)?;
        }
    }
    for group in file.refuse {
        let errno = errno(&group.errno).map_err(within)?;
        for call in numbers(&group.calls, &group.why).map_err(within)? {
            if policy.refuse.insert(call, errno).is_some() {
                return Err(within(format!("call {call} is refused twice")));
            }
        }
    }
    for include in &file.include {
        add(folder, include, constants, policy, seen)?;
    }
    Ok(())
}

fn allow(policy: &mut Policy, call: i64, conditions: &[Condition]) -> Result<(), String> {
    let known = policy.allow.contains_key(&call);
    let alternatives = policy.allow.entry(call).or_default();
    // Allowing a call outright makes its conditions elsewhere void: surely a mistake.
    if known && (conditions.is_empty() || alternatives.is_empty()) {
        return Err(format!(
            "{} is allowed twice, once with any arguments",
            syscalls::name(call).unwrap_or("?")
        ));
    }
    if !conditions.is_empty() {
        alternatives.push(conditions.to_vec());
    }
    Ok(())
}

fn numbers(calls: &[String], why: &str) -> Result<Vec<i64>, String> {
    if why.is_empty() {
        return Err(format!("no reason is given for {calls:?}"));
    }
    calls
        .iter()
        .map(|call| syscalls::number(call).ok_or_else(|| format!("no system call `{call}`")))
        .collect()
}

fn condition(text: &ConditionText, constants: &BTreeMap<String, u64>) -> Result<Condition, String> {
    let value = |name: &String| {
        constants.get(name).copied().ok_or_else(|| format!("`{name}` is not in constants.json"))
    };
    let values = |names: &Vec<String>| names.iter().map(value).collect::<Result<Vec<_>, _>>();
    let bits = |names| values(names).map(|v| v.into_iter().fold(0, |all, bit| all | bit));
    let test = match (&text.set, &text.clear, &text.one_of, &text.at_least) {
        (Some(names), None, None, None) => Test::Set(bits(names)?),
        (None, Some(names), None, None) => Test::Clear(bits(names)?),
        (None, None, Some(names), None) => Test::OneOf(values(names)?),
        (None, None, None, Some(name)) => Test::AtLeast(value(name)?),
        _ => return Err(format!("argument {}: give exactly one test", text.arg)),
    };
    if text.arg > 5 {
        return Err(format!("a call has no argument {}", text.arg));
    }
    Ok(Condition { arg: text.arg, wide: text.wide, test })
}

fn errno(name: &str) -> Result<u32, String> {
    match name {
        "EPERM" => Ok(1),
        "EACCES" => Ok(13),
        "ENOSYS" => Ok(38),
        _ => Err(format!("errno `{name}` is not known here")),
    }
}
