use super::*;

fn one(filter: &str) -> Result<Rule, String> {
    Policy::parse("p", &format!("read: {filter}"))
        .map(|policy| policy.rules[0].1.clone())
        .map_err(|error| error.to_string())
}

fn allowed_if(any: &[&[(u8, Op, u64)]]) -> Rule {
    let test = |t: &(u8, Op, u64)| Test { arg: t.0, op: t.1, value: t.2 };
    let any = any.iter().map(|all| all.iter().map(test).collect()).collect();
    Rule { any, otherwise: Action::Default }
}

#[test]
fn filters() {
    let always = allowed_if(&[&[]]);
    for (text, rule) in [
        ("1", always.clone()),
        ("allow", always.clone()),
        ("return ENOENT", Rule { any: vec![], otherwise: Action::Errno(2) }),
        ("return 38", Rule { any: vec![], otherwise: Action::Errno(38) }),
        ("kill-thread", Rule { any: vec![], otherwise: Action::KillThread }),
        ("trap # and why", Rule { any: vec![], otherwise: Action::Trap }),
        ("arg0 == 3 || arg2 in ~PROT_EXEC", allowed_if(&[&[(0, Op::Eq, 3)], &[(2, Op::In, !4)]])),
        (
            "arg0 != -1 && arg1<=0x10&&arg5 & (O_RDWR|O_CREAT) || arg1 >= 010",
            allowed_if(&[
                &[(0, Op::Ne, u64::MAX), (1, Op::Le, 16), (5, Op::Any, 0x42)],
                &[(1, Op::Ge, 8)],
            ]),
        ),
        (
            "arg1 < 1; return EPERM",
            Rule { otherwise: Action::Errno(1), ..allowed_if(&[&[(1, Op::Lt, 1)]]) },
        ),
        (
            "arg0 > ~(1|2)|1 ; trap",
            Rule { otherwise: Action::Trap, ..allowed_if(&[&[(0, Op::Gt, !2)]]) },
        ),
        ("arg1 == ARCH_SET_FS", allowed_if(&[&[(1, Op::Eq, 0x1002)]])),
        ("arg0 == AT_FDCWD", allowed_if(&[&[(0, Op::Eq, -100i64 as u64)]])),
    ] {
        assert_eq!(one(text), Ok(rule), "{text}");
    }
}

#[test]
fn errors_name_file_line_and_reason() {
    for (text, part) in [
        ("read: 1\nreed: 1", "p, line 2: no system call `reed`"),
        ("# x\n\nread", "p, line 3: a rule is `CALL: FILTER`"),
        ("read: 1\n\nread: 1", "p, line 3: `read` has a rule already, in p, line 1"),
        ("read: arg6 == 1", "no argument 6"),
        ("read: arg1 = 1", "`arg1 = 1` is not a test"),
        ("read: arg1 == FOO", "`FOO` is neither a number nor a constant"),
        ("read: arg1 == (1|2", "a parenthesis is not closed"),
        ("read: arg1 == 1 2", "`2` is left over"),
        ("read: arg1 ==", "a value is missing"),
        ("read: arg1 == 1 &&", "`` is not a test"),
        ("read: return EFOO", "no errno `EFOO`"),
        ("read: return 4096", "no errno `4096`"),
        ("read: maybe", "`maybe` is not a test"),
        ("read: arg0 == 1; allow", "`allow` is no action for when a test fails"),
        ("read: user-notify", "wants a supervisor"),
        ("read: {arg0 == 1, arg1 == 2}", "lists of filters in braces"),
        ("read:", "a rule is `CALL: FILTER`"),
        ("@default allow", "would allow every call"),
        ("@default kill\n@default kill", "line 2: @default was given already"),
        ("@denylist", "@denylist is not supported"),
        ("@frob x", "no directive `@frob`"),
        ("@include", "@include without a file"),
        ("read: arg1 == 99999999999999999999", "is neither a number"),
        (&format!("read: arg1 == {}1", "~".repeat(100)), "a value is too long"),
    ] {
        let error = Policy::parse("p", text).expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn includes_are_relative_and_end() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).expect("written");
        dir.path().join(name)
    };
    std::fs::create_dir(dir.path().join("sub")).expect("a folder");
    let main = write("plugin.policy", "@include sub/a.policy\n@frequency x\nread: 1");
    write("sub/a.policy", "@include ./b.policy\n{write, close}: \\\n 1");
    write("sub/b.policy", "poll: return ENOSYS");
    let policy = Policy::read(&main).expect("reads");
    let calls: Vec<_> = policy.rules.iter().map(|(call, _)| *call).collect();
    assert_eq!(calls, [7, 1, 3, 0]);

    write("sub/b.policy", "\nfoo: 1");
    let error = Policy::read(&main).expect_err("unknown call").to_string();
    assert!(error.contains("sub/./b.policy, line 2: no system call `foo`"), "{error}");
    write("sub/b.policy", "@include none");
    let error = Policy::read(&main).expect_err("no file").to_string();
    assert!(error.contains("sub/none that ") && error.contains("line 1 includes"), "{error}");
    write("sub/b.policy", "@include b.policy");
    let error = Policy::read(&main).expect_err("a circle").to_string();
    assert!(error.contains("more than 8 files include one another"), "{error}");
    let error = Policy::read(dir.path()).expect_err("a folder").to_string();
    assert!(error.contains("reading the seccomp policy"), "{error}");
}

#[test]
fn more_rules_are_added_in_front() {
    let policy = Policy::parse("p", "mmap: arg2 in ~PROT_EXEC; return EPERM\nread: 1").expect("ok");
    let more = Policy::parse("q", "mmap: arg3 == MAP_PRIVATE\nfutex: 1").expect("ok");
    let both = policy.and(&more);
    let mmap = &both.rules.iter().find(|(call, _)| *call == 9).expect("there").1;
    assert_eq!((mmap.any.len(), mmap.otherwise), (2, Action::Errno(1)));
    assert_eq!(mmap.any[0][0].arg, 3);
    assert_eq!(both.rules.len(), 3);
}
