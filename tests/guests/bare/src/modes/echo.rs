//! The console there and back.

use crate::arch::cpu;
use crate::boot::Boot;
use crate::console;
use crate::heap::Heap;
use crate::virtio::blk::{Disk, Options};

const LAST_WORD: &[u8] = b"quit";

/// Gives back what it reads, until the input has said `quit`. With `open` a disk is set up first,
/// and left alone.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let open = boot.cmdline.flag("open");
    let _disk = open.then(|| Disk::open(boot, &mut heap, Options::from_cmdline(boot)));
    let irq = boot.cmdline.flag("irq");
    if irq {
        console::enable_interrupt();
    }
    say!("echo: ready");
    let mut matched = 0;
    let mut count = 0u64;
    while matched < LAST_WORD.len() {
        let byte = loop {
            let input = if irq { console::wait() } else { console::poll() };
            match input {
                Some(byte) => break byte,
                None => core::hint::spin_loop(),
            }
        };
        console::write(&[byte]);
        count += 1;
        matched = match byte {
            _ if byte == LAST_WORD[matched] => matched + 1,
            _ => usize::from(byte == LAST_WORD[0]),
        };
    }
    cpu::interrupts_on();
    say!("\necho: bytes={count}");
}
