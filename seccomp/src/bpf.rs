//! Pieces of classic BPF programs for seccomp, shared by the policy compilers: the one
//! at build time and the one for text policies.

use seccompiler::sock_filter;

// include/uapi/linux/bpf_common.h, filter.h, audit.h
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const JUMP_ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
// Of struct seccomp_data.
pub const NUMBER_OFFSET: u32 = 0;
pub const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// First number, and the code for it and all numbers up to the next range.
pub type Range = (u32, Vec<sock_filter>);

/// Adds a range; one that starts where the last does replaces it, one that does
/// the same continues it.
pub fn push(ranges: &mut Vec<Range>, start: u32, code: Vec<sock_filter>) {
    if ranges.last().is_some_and(|(last, _)| *last == start) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|(_, last)| *last != code) {
        ranges.push((start, code));
    }
}

/// Binary search; the accumulator holds the call's number.
pub fn search(ranges: &[Range]) -> Result<Vec<sock_filter>, String> {
    let middle = ranges.len() / 2;
    if middle == 0 {
        return Ok(ranges.first().ok_or("no ranges")?.1.clone());
    }
    let (low, high) = (search(&ranges[..middle])?, search(&ranges[middle..])?);
    let skip = u32::try_from(low.len()).map_err(|e| e.to_string())?;
    // A conditional jump reaches 255 instructions, the plain one any number.
    let mut program = vec![jump_at_least(ranges[middle].0, 0, 1), op(JUMP, 0, 0, skip)];
    program.extend(low);
    program.extend(high);
    Ok(program)
}

/// Where the low and the high word of an argument are.
#[allow(dead_code)] // not used at build time
pub fn argument(number: u8) -> (u32, u32) {
    let low = ARGUMENTS_OFFSET + 8 * u32::from(number);
    (low, low + 4)
}

pub fn load(offset: u32) -> sock_filter {
    op(LOAD, 0, 0, offset)
}

pub fn op_return(value: u32) -> sock_filter {
    op(RETURN, 0, 0, value)
}

pub fn jump_equal(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(JUMP_EQUAL, jt, jf, k)
}

#[allow(dead_code)] // not used at build time
pub fn jump_greater(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(JUMP_GREATER, jt, jf, k)
}

pub fn jump_at_least(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(JUMP_AT_LEAST, jt, jf, k)
}

#[allow(dead_code)] // not used at build time
pub fn jump_any_bit(k: u32, jt: u8, jf: u8) -> sock_filter {
    op(JUMP_ANY_BIT, jt, jf, k)
}

fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
