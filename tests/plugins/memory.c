/* Memory: what is refused and in which order, read-only memory, the dirty log. */
#include "harness.h"

/* Writes a byte into every second page from 0x10000 to 0x20000, then says so. */
GUEST(guest,
      "mov $0x1000, %ax\n mov %ax, %es\n mov $8, %cx\n xor %di, %di\n"
      "1: movb $0x5a, %es:(%di)\n add $0x2000, %di\n loop 1b\n out %al, $0x10\n"
      /* Into the read-only memory, where it becomes an access. */
      "mov $0x3000, %ax\n mov %ax, %es\n movw $0x1234, %es:8\n mov %es:8, %ax\n out %ax, $0x10\n hlt");

int main(void) {
  struct crosvm *vm = connect_vm();
  struct crosvm_memory *memory = NULL, *second;
  const uint64_t MIB = 1 << 20;
  int good = memory_fd(MIB);
  int plain = memfd_create("plain", MFD_ALLOW_SEALING);
  CHECK(!ftruncate(plain, MIB));
  int event = eventfd(0, 0);
  /* In this order. */
#define TRY(fd, offset, length, start) \
  crosvm_create_memory(vm, fd, offset, length, start, false, false, &memory)
  ERR(TRY(-1, 1, MIB, 0), EINVAL);
  ERR(TRY(-1, 0, 1, 0), EINVAL);
  ERR(TRY(-1, 0, MIB, 0), EBADF);
  ERR(TRY(9999, 0, MIB, 0), EBADF);
  ERR(TRY(event, 0, MIB, 0), EINVAL);
  ERR(TRY(plain, ~0xfffull, 8192, 0), EPERM);
  ERR(TRY(good, ~0xfffull, 8192, 0), EOVERFLOW);
  ERR(TRY(good, 4096, MIB, 0), EINVAL);
  ERR(TRY(good, 0, 2 * MIB, 0), EINVAL);
  ERR(TRY(good, 0, 0, 0), EINVAL);
  CHECK(!memory);
  OK(crosvm_create_memory(vm, good, 0, 64 << 10, 0, false, false, &memory));
  ERR(crosvm_create_memory(vm, good, 0, 4096, 0xf000, false, false, &second), EEXIST);
  ERR(crosvm_create_memory(vm, good, 0, MIB, 0, false, false, &second), EEXIST);
  uint8_t log[2] = {0};
  ERR(crosvm_memory_get_dirty_log(vm, memory, log), ENOENT);
  struct crosvm_memory *gone = memory;
  OK(crosvm_destroy_memory(vm, &memory));
  CHECK(!memory);
  ERR(crosvm_destroy_memory(vm, &memory), ENOENT);
  ERR(crosvm_destroy_memory(vm, &gone), ENOENT);
  ERR(crosvm_memory_get_dirty_log(vm, gone, log), ENOENT);

  uint8_t *low = give_memory(vm, 0, 64 << 10);
  memcpy(low + CODE, guest, guest_end - guest);
  int logged = memory_fd(64 << 10);
  OK(crosvm_create_memory(vm, logged, 0, 64 << 10, 0x10000, false, true, &memory));
  int rom = memory_fd(4096);
  map(rom, 4096)[8] = 0x77;
  OK(crosvm_create_memory(vm, rom, 0, 4096, 0x30000, true, false, &second));
  OK(crosvm_reserve_range(vm, MMIO, 0x30000, 4096));
  OK(crosvm_reserve_range(vm, PORT, 0x10, 1));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));
  expect_access(vcpu, PORT, 0x10, true, 1);
  OK(crosvm_memory_get_dirty_log(vm, memory, log));
  SAME(log[0], 0x55);
  SAME(log[1], 0x55);
  CHECK(map(logged, 65536)[0xe000] == 0x5a);
  /* Reading has cleared it. */
  OK(crosvm_memory_get_dirty_log(vm, memory, log));
  SAME(log[0] | log[1], 0);
  OK(crosvm_vcpu_resume(vcpu));
  expect_write(vcpu, MMIO, 0x30008, 2, 0x1234);
  /* The write has not reached the memory, and the read comes from there. */
  expect_write(vcpu, PORT, 0x10, 2, 0x77);
  return 0;
}
