//! A load for a guest that is written down and restored: vector registers (SSE, and AVX where the
//! processor has it) that must keep their values, a file that must read back as written, clocks that must not step back.
//!
//! usage: load FILE STOP      until STOP exists; then `load: passed`, or `load: FAIL why`

use std::arch::x86_64::*;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

const BLOCK: usize = 64 * 1024;
const BLOCKS: u64 = 64;

fn main() {
    let mut words = std::env::args().skip(1);
    let (file, stop) = (words.next().expect("FILE"), words.next().expect("STOP"));
    match run(&file, &stop) {
        Ok(rounds) => println!("load: passed after {rounds} rounds"),
        Err(why) => {
            println!("load: FAIL {why}");
            std::process::exit(1);
        }
    }
}

fn run(path: &str, stop: &str) -> Result<u64, String> {
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let mut file = open.map_err(|e| format!("{path}: {e}"))?;
    let mut generations = vec![0u64; BLOCKS as usize];
    let (mut monotonic, mut real) = (Instant::now(), SystemTime::now());
    let mut rounds = 0;
    while !Path::new(stop).exists() {
        rounds += 1;
        narrow_vectors(rounds)?;
        if is_x86_feature_detected!("avx") {
            // SAFETY: the processor has AVX.
            unsafe { vectors(rounds) }?;
        }
        let block = rounds * 7 % BLOCKS;
        generations[block as usize] = rounds;
        write(&mut file, block, rounds).map_err(|e| format!("writing: {e}"))?;
        let other = rounds * 13 % BLOCKS;
        if generations[other as usize] != 0 {
            check(&mut file, other, generations[other as usize])?;
        }
        let (now, wall) = (Instant::now(), SystemTime::now());
        if now < monotonic {
            return Err("the monotonic clock stepped back".into());
        }
        if wall + Duration::from_millis(50) < real {
            return Err(format!("the date stepped back from {real:?} to {wall:?}"));
        }
        (monotonic, real) = (now, wall);
        if rounds % 50 == 0 {
            file.sync_all().map_err(|e| format!("syncing: {e}"))?;
        }
    }
    for (block, generation) in (0..).zip(&generations).filter(|(_, g)| **g != 0) {
        check(&mut file, block, *generation)?;
    }
    Ok(rounds)
}

/// As below, with the registers that every processor has.
fn narrow_vectors(seed: u64) -> Result<(), String> {
    let value = |n: usize| seed as u32 as i32 + n as i32;
    // SAFETY: every x86-64 processor has SSE2.
    let mut registers: [__m128i; 16] = std::array::from_fn(|n| unsafe { _mm_set1_epi32(value(n)) });
    for _ in 0..2000 {
        for register in &mut registers {
            // SAFETY: as above.
            *register = unsafe { _mm_add_epi32(*register, _mm_set1_epi32(1)) };
        }
        std::hint::black_box(&mut registers);
    }
    for (n, register) in registers.iter().enumerate() {
        let mut lanes = [0i32; 4];
        // SAFETY: four lanes of four bytes.
        unsafe { _mm_storeu_si128(lanes.as_mut_ptr().cast(), *register) };
        if lanes
            .iter()
            .any(|lane| *lane != value(n).wrapping_add(2000))
        {
            return Err(format!("register {n} is {lanes:?}"));
        }
    }
    Ok(())
}

/// Sixteen registers hold a value each while time passes.
#[target_feature(enable = "avx")]
unsafe fn vectors(seed: u64) -> Result<(), String> {
    let mut registers = [_mm256_setzero_ps(); 16];
    for (n, register) in registers.iter_mut().enumerate() {
        *register = _mm256_set1_ps(seed as u32 as f32 + n as f32);
    }
    for _ in 0..2000 {
        for register in &mut registers {
            *register = _mm256_add_ps(*register, _mm256_set1_ps(1.0));
        }
        std::hint::black_box(&mut registers);
    }
    for (n, register) in registers.iter().enumerate() {
        let mut lanes = [0f32; 8];
        // SAFETY: eight lanes of four bytes.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), *register) };
        let mut want = seed as u32 as f32 + n as f32;
        (0..2000).for_each(|_| want += 1.0);
        if lanes.iter().any(|lane| *lane != want) {
            return Err(format!("register {n} is {lanes:?}, not {want}"));
        }
    }
    Ok(())
}

fn pattern(block: u64, generation: u64) -> Vec<u8> {
    let mut word = block << 32 ^ generation;
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        word = word
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn write(file: &mut File, block: u64, generation: u64) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(block * BLOCK as u64))?;
    file.write_all(&pattern(block, generation))
}

fn check(file: &mut File, block: u64, generation: u64) -> Result<(), String> {
    let mut bytes = vec![0; BLOCK];
    let read = file
        .seek(SeekFrom::Start(block * BLOCK as u64))
        .and_then(|_| file.read_exact(&mut bytes));
    read.map_err(|e| format!("reading: {e}"))?;
    if bytes != pattern(block, generation) {
        return Err(format!("block {block} is not of generation {generation}"));
    }
    Ok(())
}
