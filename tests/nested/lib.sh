# What the scripts here share: finding Debian's pieces and laying out small root folders.
# shellcheck shell=bash

die() {
    echo "${0##*/}: $*" >&2
    exit 125
}

# need PROGRAM PACKAGE: stops with the remedy when a program is missing.
need() {
    PATH=$PATH:/sbin:/usr/sbin command -v "$1" >/dev/null ||
        die "$1 is missing; install the Debian package $2"
}

# The newest Debian cloud kernel: sets $kernel and $release.
find_kernel() {
    kernel=$(find /boot -name 'vmlinuz-*-cloud-amd64' | sort -V | tail -n 1)
    [ -n "$kernel" ] ||
        die "no /boot/vmlinuz-*-cloud-amd64; install the Debian package linux-image-cloud-amd64"
    release=${kernel#/boot/vmlinuz-}
    [ -d "/lib/modules/$release" ] || die "the modules of kernel $release are missing"
}

# copy_modules ROOT MODULE...: the modules and all they depend on, to ROOT/modules, with their names
# in loading order in ROOT/modules/order. What is built into the kernel is left out.
copy_modules() {
    local root=$1 module path
    shift
    mkdir -p "$root/modules"
    for module in "$@"; do
        PATH=$PATH:/sbin:/usr/sbin modprobe -S "$release" --show-depends "$module" ||
            die "kernel $release has no module $module"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r path; do
        cp "$path" "$root/modules/"
        echo "${path##*/}" >> "$root/modules/order"
    done
}

# copy_libraries ROOT PROGRAM...: the shared libraries that the programs load, at their own paths.
copy_libraries() {
    local root=$1 library
    shift
    for program in "$@"; do
        ldd "$program" 2>/dev/null || true
    done | awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\// { print $1 }' | sort -u |
        while read -r library; do
            mkdir -p "$root$(dirname "$library")"
            cp -L "$library" "$root$library"
        done
}

# install_busybox ROOT
install_busybox() {
    local busybox
    need busybox busybox-static
    busybox=$(command -v busybox)
    if ldd "$busybox" >/dev/null 2>&1; then
        die "$busybox is not static; install the Debian package busybox-static"
    fi
    mkdir -p "$1"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,tmp,run,root}
    cp "$busybox" "$1/bin/busybox"
}

# pack ROOT FILE: an initramfs. Not compressed: unpacking is what an emulated machine is slow at.
pack() {
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0) > "$2"
}
