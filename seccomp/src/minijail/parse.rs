//! From text to rules.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Action, Op, Policy, PolicyError, Rule, Test, constants};
use crate::syscalls;

/// Files that include one another, and no more.
const MAX_DEPTH: usize = 8;
/// Bytes of one file, and rules of a policy: far beyond any policy, and an end.
const MAX_FILE: u64 = 1 << 20;
const MAX_RULES: usize = 1024;
/// Tests of one alternative: what a conditional jump can skip.
const MAX_TESTS: usize = 40;

pub(super) fn file(path: &Path) -> Result<Policy, PolicyError> {
    let mut reader = Reader::new(path);
    reader.file(path, None, 0)?;
    Ok(reader.policy)
}

pub(super) fn text(name: &Path, text: &str) -> Result<Policy, PolicyError> {
    let mut reader = Reader::new(name);
    reader.text(name, text, MAX_DEPTH)?;
    Ok(reader.policy)
}

struct Reader {
    policy: Policy,
    /// Where each call was named, for the message when it is again.
    seen: Vec<(i64, PathBuf, usize)>,
    has_default: bool,
}

impl Reader {
    fn new(path: &Path) -> Reader {
        let default = Action::Default;
        let policy = Policy { path: path.to_owned(), rules: Vec::new(), default };
        Reader { policy, seen: Vec::new(), has_default: false }
    }

    fn file(
        &mut self,
        path: &Path,
        from: Option<(PathBuf, usize)>,
        depth: usize,
    ) -> Result<(), PolicyError> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
            .map_err(|source| PolicyError::Read { path: path.to_owned(), from, source })?;
        if text.len() as u64 > MAX_FILE {
            let message = format!("it has more than {MAX_FILE} bytes");
            return Err(PolicyError::Whole { path: path.to_owned(), message });
        }
        self.text(path, &text, depth)
    }

    fn text(&mut self, path: &Path, text: &str, depth: usize) -> Result<(), PolicyError> {
        let mut lines = text.lines().enumerate();
        while let Some((n, first)) = lines.next() {
            let mut whole = uncommented(first).to_string();
            while let Some(head) = whole.strip_suffix('\\') {
                let next = lines.next().map_or("", |(_, line)| uncommented(line));
                whole = format!("{} {next}", head.trim_end());
            }
            if !whole.is_empty() {
                self.line(path, n + 1, &whole, depth)?;
            }
        }
        Ok(())
    }

    fn line(
        &mut self,
        path: &Path,
        line: usize,
        text: &str,
        depth: usize,
    ) -> Result<(), PolicyError> {
        let wrong = |message: String| PolicyError::Line { path: path.to_owned(), line, message };
        if let Some(directive) = text.strip_prefix('@') {
            let (word, rest) = directive.split_once(char::is_whitespace).unwrap_or((directive, ""));
            let rest = rest.trim();
            return match word {
                "include" if rest.is_empty() => Err(wrong("@include without a file".into())),
                "include" if depth >= MAX_DEPTH => {
                    Err(wrong(format!("more than {MAX_DEPTH} files include one another")))
                }
                "include" => {
                    let folder = path.parent().unwrap_or(Path::new(""));
                    let from = Some((path.to_owned(), line));
                    self.file(&folder.join(rest), from, depth + 1)
                }
                "default" => self.default(rest).map_err(wrong),
                "frequency" => Ok(()),
                "denylist" => {
                    Err(wrong("@denylist is not supported: name the calls that are allowed".into()))
                }
                _ => Err(wrong(format!("no directive `@{word}`"))),
            };
        }
        let (names, filter) =
            text.split_once(':').ok_or_else(|| wrong("a rule is `CALL: FILTER`".into()))?;
        let rule = rule(filter).map_err(wrong)?;
        for name in calls(names) {
            let call = syscalls::number(name)
                .ok_or_else(|| wrong(format!("no system call `{name}` on x86_64")))?;
            if let Some((_, at, before)) = self.seen.iter().find(|(seen, ..)| *seen == call) {
                let message =
                    format!("`{name}` has a rule already, in {}, line {before}", at.display());
                return Err(wrong(message));
            }
            if self.policy.rules.len() >= MAX_RULES {
                return Err(wrong(format!("more than {MAX_RULES} rules")));
            }
            self.seen.push((call, path.to_owned(), line));
            self.policy.rules.push((call, rule.clone()));
        }
        Ok(())
    }

    fn default(&mut self, text: &str) -> Result<(), String> {
        if std::mem::replace(&mut self.has_default, true) {
            return Err("@default was given already".into());
        }
        self.policy.default = match action(text)? {
            Some(Action::Allow) => {
                return Err("@default allow would allow every call there is".into());
            }
            Some(action) => action,
            None => return Err(format!("`{text}` is no action for @default")),
        };
        Ok(())
    }
}

fn uncommented(line: &str) -> &str {
    line.split('#').next().unwrap_or("").trim()
}

/// `read` or `{read, write}`.
fn calls(names: &str) -> impl Iterator<Item = &str> {
    let names = names.trim();
    let inner = names.strip_prefix('{').and_then(|n| n.strip_suffix('}')).unwrap_or(names);
    inner.split(',').map(str::trim)
}

fn rule(filter: &str) -> Result<Rule, String> {
    let filter = filter.trim();
    if filter.is_empty() {
        return Err("a rule is `CALL: FILTER`".into());
    }
    if filter.starts_with('{') {
        return Err("lists of filters in braces are not supported: join them with `||`".into());
    }
    match action(filter)? {
        Some(Action::Allow) => {
            return Ok(Rule { any: vec![Vec::new()], otherwise: Action::Default });
        }
        Some(otherwise) => return Ok(Rule { any: Vec::new(), otherwise }),
        None => {}
    }
    let (tests, otherwise) = match filter.split_once(';') {
        Some((tests, text)) => {
            let text = text.trim();
            match action(text)? {
                Some(Action::Allow) | None => {
                    return Err(format!("`{text}` is no action for when a test fails"));
                }
                Some(action) => (tests, action),
            }
        }
        None => (filter, Action::Default),
    };
    let any = tests
        .split("||")
        .map(|all| {
            let tests = all.split("&&").map(test).collect::<Result<Vec<_>, _>>()?;
            match tests.len() {
                0..=MAX_TESTS => Ok(tests),
                n => Err(format!("{n} tests joined by `&&` are more than {MAX_TESTS}")),
            }
        })
        .collect::<Result<_, String>>()?;
    Ok(Rule { any, otherwise })
}

/// None where the text is no action but, one hopes, an expression.
fn action(text: &str) -> Result<Option<Action>, String> {
    if let Some(errno) = text.strip_prefix("return").filter(|t| t.starts_with(char::is_whitespace))
    {
        let errno = errno.trim();
        let number = constants::errno(errno)
            .or_else(|| errno.parse().ok().filter(|n| *n < 4096))
            .ok_or_else(|| format!("no errno `{errno}`"))?;
        return Ok(Some(Action::Errno(number)));
    }
    Ok(Some(match text {
        "1" | "allow" => Action::Allow,
        "kill" | "kill-process" => Action::KillProcess,
        "kill-thread" => Action::KillThread,
        "trap" => Action::Trap,
        "log" => Action::Log,
        "trace" | "user-notify" => {
            return Err(format!("`{text}` wants a supervisor, and there is none"));
        }
        _ => return Ok(None),
    }))
}

fn test(text: &str) -> Result<Test, String> {
    let text = text.trim();
    let form = || format!("`{text}` is not a test: argN OP VALUE");
    let rest = text.strip_prefix("arg").ok_or_else(form)?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(form)?;
    let (number, rest) = rest.split_at(digits);
    let arg: u8 = number.parse().map_err(|_| form())?;
    if arg > 5 {
        return Err(format!("a call has no argument {arg}: arg0 to arg5"));
    }
    // Longer operators before those they start with.
    const OPS: [(&str, Op); 8] = [
        ("==", Op::Eq),
        ("!=", Op::Ne),
        ("<=", Op::Le),
        (">=", Op::Ge),
        ("<", Op::Lt),
        (">", Op::Gt),
        ("&", Op::Any),
        ("in ", Op::In),
    ];
    let rest = rest.trim_start();
    let (op, value) = OPS
        .iter()
        .find_map(|(word, op)| rest.strip_prefix(word).map(|value| (*op, value)))
        .ok_or_else(form)?;
    Ok(Test { arg, op, value: value_of(value)? })
}

fn value_of(text: &str) -> Result<u64, String> {
    let mut value = Value { rest: text.trim(), depth: 0 };
    let result = value.or()?;
    if value.rest.is_empty() {
        Ok(result)
    } else {
        Err(format!("`{}` is left over after a value", value.rest))
    }
}

/// A value being read: what is left of it.
struct Value<'a> {
    rest: &'a str,
    depth: usize,
}

impl Value<'_> {
    fn or(&mut self) -> Result<u64, String> {
        let mut value = self.atom()?;
        while let Some(rest) = self.rest.strip_prefix('|') {
            self.rest = rest.trim_start();
            value |= self.atom()?;
        }
        Ok(value)
    }

    fn atom(&mut self) -> Result<u64, String> {
        self.depth += 1;
        if self.depth > 64 {
            return Err("a value is too long".into());
        }
        if let Some(rest) = self.rest.strip_prefix('~') {
            self.rest = rest.trim_start();
            return self.atom().map(|value| !value);
        }
        if let Some(rest) = self.rest.strip_prefix('(') {
            self.rest = rest.trim_start();
            let value = self.or()?;
            let rest = self.rest.strip_prefix(')').ok_or("a parenthesis is not closed")?;
            self.rest = rest.trim_start();
            return Ok(value);
        }
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let end = self.rest.find(|c| !word(c)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        if text.is_empty() {
            return Err("a value is missing".into());
        }
        number(text)
            .or_else(|| constants::value(text))
            .ok_or_else(|| format!("`{text}` is neither a number nor a constant known here"))
    }
}

fn number(text: &str) -> Option<u64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let digits = digits.to_ascii_lowercase();
    let value = match (digits.strip_prefix("0x"), digits.strip_prefix('0')) {
        (Some(hex), _) => u64::from_str_radix(hex, 16).ok()?,
        (_, Some(octal)) if !octal.is_empty() => u64::from_str_radix(octal, 8).ok()?,
        _ => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
