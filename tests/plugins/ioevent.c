/* io events: which writes signal them, and that those are no accesses. */
#include "harness.h"

GUEST(guest,
      "mov $0x500, %dx\n mov $0x11, %al\n out %al, %dx\n mov $0x12, %al\n out %al, %dx\n"
      "mov $0x510, %dx\n out %al, %dx\n mov $0x1234, %ax\n out %ax, %dx\n out %eax, %dx\n"
      "mov $0x520, %dx\n out %al, %dx\n out %ax, %dx\n"
      "mov $0xf000, %bx\n mov %bx, %es\n movl $0xcafe, %es:0x40\n movl $0xcaff, %es:0x40\n"
      "mov $0x530, %dx\n out %al, %dx\n hlt");

static uint64_t count(struct crosvm_io *io) {
  uint64_t value = 0;
  int fd = OK(crosvm_io_event_fd(io));
  if (readable(fd, 0)) CHECK(read(fd, &value, 8) == 8);
  return value;
}

int main(void) {
  struct crosvm *vm = connect_vm();
  uint8_t *memory = give_memory(vm, 0, 0xf0000);
  memcpy(memory + CODE, guest, guest_end - guest);
  struct crosvm_io *one, *any = NULL, *word, *all, *mmio;
  uint8_t match = 0x11;
  uint32_t cafe = 0xcafe;
  ERR(crosvm_create_io_event(vm, PORT, 0x500, 3, NULL, &any), EINVAL);
  ERR(crosvm_create_io_event(vm, PORT, 0x500, 16, NULL, &any), EINVAL);
  ERR(crosvm_create_io_event(vm, 7, 0x500, 1, NULL, &any), EINVAL);
  CHECK(!any);
  ERR(crosvm_destroy_io_event(vm, &any), ENOENT);
  OK(crosvm_create_io_event(vm, PORT, 0x500, 1, &match, &one));
  OK(crosvm_create_io_event(vm, PORT, 0x510, 2, NULL, &word));
  OK(crosvm_create_io_event(vm, PORT, 0x520, 0, NULL, &all));
  OK(crosvm_create_io_event(vm, MMIO, 0xf0040, 4, (uint8_t *)&cafe, &mmio));
  OK(crosvm_reserve_range(vm, PORT, 0x500, 0x31));
  OK(crosvm_reserve_range(vm, MMIO, 0xf0000, 0x1000));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));
  /* What is not the event's is an access. */
  expect_write(vcpu, PORT, 0x500, 1, 0x12);
  expect_write(vcpu, PORT, 0x510, 1, 0x12);
  expect_write(vcpu, PORT, 0x510, 4, 0x1234);
  expect_write(vcpu, MMIO, 0xf0040, 4, 0xcaff);
  SAME(count(one), 1);
  SAME(count(word), 1);
  SAME(count(all), 2);
  SAME(count(mmio), 1);
  struct crosvm_io *gone = one;
  OK(crosvm_destroy_io_event(vm, &one));
  CHECK(!one);
  ERR(crosvm_destroy_io_event(vm, &gone), ENOENT);
  OK(crosvm_destroy_io_event(vm, &word));
  OK(crosvm_destroy_io_event(vm, &all));
  OK(crosvm_destroy_io_event(vm, &mmio));
  expect_access(vcpu, PORT, 0x530, true, 1);
  return 0;
}
