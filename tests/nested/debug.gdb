# What gdb does to the guest of tests/nested/debug; the addresses of the kernel's symbols come
# before. Whatever a vCPU was doing is right, in the kernel or in a program.
set pagination off
set confirm off
# An emulated machine that is busy answers late.
set remotetimeout 120
set architecture i386:x86-64
target remote /tmp/gdb
info threads

define look
    printf "look %d: %#lx %#lx %d\n", $arg0, $pc, $rsp, $cs & 3
    if ($cs & 3) == 0
        printf "look %d: in the kernel %d\n", $arg0, (unsigned long) $rsp >= 0xffff800000000000
    else
        printf "look %d: in a program %d\n", $arg0, $rsp != 0 && (unsigned long) $rsp < 0x800000000000
    end
end
thread 1
look 1
thread 2
look 2
printf "banner %s", (char *) $banner

# An instruction that repeats itself stays where it is, and counts.
thread 1
set $steps = 0
set $moved = 0
while $steps < 5 || ($steps < 100 && $moved == 0)
    set $pc_before = $pc
    set $rcx_before = $rcx
    stepi
    set $moved = $moved + ($pc != $pc_before || $rcx != $rcx_before)
    set $steps = $steps + 1
end
printf "moved in %d of %d steps\n", $moved, $steps

# It runs, and is stopped as by a key.
shell (sleep 3; kill -INT $PPID) &
continue
thread 1
look 3
set var *(int *) $panic_timeout = 77
printf "timeout %d\n", *(int *) $panic_timeout
detach
