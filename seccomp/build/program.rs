//! From a policy to a BPF program.
//!
//! A binary search over the call's number leads to what happens to it: allowed,
//! answered with an errno, not in the policy, or, where arguments matter, a small
//! program compiled by seccompiler. The search is ours because the kernel, when a
//! filter is installed, tries it with every call number: with seccompiler's list
//! of comparisons that costs a device process a third of a millisecond.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::bpf::{
    ARCH_OFFSET, AUDIT_ARCH_X86_64, NUMBER_OFFSET, Range, jump_equal, load, op_return, push, search,
};
use crate::policy::{Condition, Policy, Test};

/// What happens to a call that is not in the policy.
#[derive(Clone, Copy)]
pub enum Otherwise {
    /// SIGSYS, whose handler reports the call and ends the process.
    Trap,
    /// The kernel logs it and lets it through.
    Log,
}

/// BPF_MAXINSNS.
const MAX_LEN: usize = 4096;

/// Compiles `policy` for x86_64.
pub fn compile(policy: &Policy, otherwise: Otherwise) -> Result<BpfProgram, String> {
    let missing = match otherwise {
        Otherwise::Trap => SeccompAction::Trap,
        Otherwise::Log => SeccompAction::Log,
    };
    let mut program = vec![
        // A 32-bit call (int 0x80) is named like any other violation, in both
        // modes: its numbers mean other calls.
        load(ARCH_OFFSET),
        jump_equal(AUDIT_ARCH_X86_64, 1, 0),
        op_return(u32::from(SeccompAction::Trap)),
        load(NUMBER_OFFSET),
    ];
    // x32 calls have bit 30 set, and so numbers beyond all of these.
    program.extend(search(&ranges(policy, &missing)?)?);
    if program.len() > MAX_LEN {
        return Err(format!("{} instructions are more than the kernel takes", program.len()));
    }
    Ok(program)
}

/// What happens to every number, as ranges from 0 on.
fn ranges(policy: &Policy, missing: &SeccompAction) -> Result<Vec<Range>, String> {
    let mut calls: BTreeMap<i64, BpfProgram> = BTreeMap::new();
    for (call, alternatives) in &policy.allow {
        let code = if alternatives.is_empty() {
            answer(&SeccompAction::Allow)
        } else {
            let mismatch = policy.refuse.get(call).map_or(missing.clone(), |e| errno(*e));
            conditions(*call, alternatives, mismatch)?
        };
        calls.insert(*call, code);
    }
    for (call, number) in &policy.refuse {
        calls.entry(*call).or_insert_with(|| answer(&errno(*number)));
    }
    let mut ranges = vec![(0, answer(missing))];
    for (call, code) in calls {
        let call = u32::try_from(call).map_err(|e| e.to_string())?;
        push(&mut ranges, call, code);
        push(&mut ranges, call + 1, answer(missing));
    }
    Ok(ranges)
}

fn answer(action: &SeccompAction) -> BpfProgram {
    vec![op_return(u32::from(action.clone()))]
}

fn errno(number: u32) -> SeccompAction {
    SeccompAction::Errno(number)
}

/// seccompiler's program for one call. It loads what it needs and always returns,
/// so it can stand anywhere.
fn conditions(
    call: i64,
    alternatives: &[Vec<Condition>],
    mismatch: SeccompAction,
) -> Result<BpfProgram, String> {
    let mut chain = Vec::new();
    for conditions in alternatives {
        for product in products(conditions)? {
            chain.push(SeccompRule::new(product).map_err(|e| e.to_string())?);
        }
    }
    let rules = BTreeMap::from([(call, chain)]);
    SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(|e| e.to_string())
}

/// seccompiler knows "and" within a rule and "or" between rules: `one_of` becomes
/// one rule per value.
fn products(conditions: &[Condition]) -> Result<Vec<Vec<SeccompCondition>>, String> {
    let mut rules: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for condition in conditions {
        // A mask test looks at the bits of the mask only, so that it is right for
        // both widths.
        let length = if condition.wide || matches!(condition.test, Test::Set(_) | Test::Clear(_)) {
            SeccompCmpArgLen::Qword
        } else {
            SeccompCmpArgLen::Dword
        };
        let tests = match &condition.test {
            Test::Set(bits) => vec![(SeccompCmpOp::MaskedEq(*bits), *bits)],
            Test::Clear(bits) => vec![(SeccompCmpOp::MaskedEq(*bits), 0)],
            Test::OneOf(values) => values.iter().map(|v| (SeccompCmpOp::Eq, *v)).collect(),
            Test::AtLeast(value) => vec![(SeccompCmpOp::Ge, *value)],
        };
        let mut next = Vec::new();
        for rule in &rules {
            for (op, value) in &tests {
                let mut rule = rule.clone();
                rule.push(
                    SeccompCondition::new(condition.arg, length.clone(), op.clone(), *value)
                        .map_err(|e| e.to_string())?,
                );
                next.push(rule);
            }
        }
        rules = next;
    }
    Ok(rules)
}
