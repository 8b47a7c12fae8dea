/* Accesses to ports and memory ranges: synchronous, asynchronous, strings, unreserved. */
#include "harness.h"

GUEST(guest,
      /* Every width of a port, both ways. */
      "mov $0x300, %dx\n mov $0x11223344, %eax\n out %al, %dx\n out %ax, %dx\n out %eax, %dx\n"
      "in %dx, %al\n mov %al, 0x4000\n in %dx, %ax\n mov %ax, 0x4001\n in %dx, %eax\n"
      "mov %eax, 0x4003\n"
      /* Nobody's port. */
      "mov $0x400, %dx\n mov $-1, %eax\n in %dx, %eax\n mov %eax, 0x4007\n out %eax, %dx\n"
      /* Starts in the range and runs past its end. */
      "mov $0x303, %dx\n mov $0xaabbccdd, %eax\n out %eax, %dx\n"
      /* Ends in the range and starts before it: nobody's. */
      "mov $0x2ff, %dx\n out %ax, %dx\n"
      /* Memory. */
      "mov $0xf000, %bx\n mov %bx, %es\n movb $0x66, %es:0x10\n movw $0x7788, %es:0x11\n"
      "movl $0x99aabbcc, %es:0x14\n mov %es:0x18, %eax\n mov %eax, 0x400b\n"
      /* Writes that nobody waits for, in order with the rest; a read of such a range. */
      "mov $0x310, %dx\n mov $1, %al\n out %al, %dx\n mov $2, %al\n out %al, %dx\n"
      "movw $3, %es:0x100\n mov $-1, %eax\n in %dx, %eax\n mov %eax, 0x400f\n"
      "mov $0x300, %dx\n mov $4, %al\n out %al, %dx\n"
      /* A string out and in: 1000 bytes, and 300 words. */
      "push %ds\n pop %es\n mov $0x5000, %si\n mov $1000, %cx\n rep outsb\n"
      "mov $0x6000, %di\n mov $300, %cx\n rep insw\n"
      "mov $5, %al\n out %al, %dx\n"
      /* Sixteen bytes of memory, out and in. */
      "mov %cr4, %eax\n or $0x200, %eax\n mov %eax, %cr4\n mov %bx, %es\n"
      "movdqu 0x4000, %xmm0\n movdqu %xmm0, %es:0x20\n movdqu %es:0x20, %xmm1\n"
      "movdqu %xmm1, 0x4100\n out %al, %dx\n hlt");

int main(void) {
  struct crosvm *vm = connect_vm();
  uint8_t *memory = give_memory(vm, 0, 0xf0000);
  memcpy(memory + CODE, guest, guest_end - guest);
  for (int i = 0; i < 1000; i++) memory[0x5000 + i] = i * 7;
  OK(crosvm_reserve_range(vm, PORT, 0x300, 4));
  ERR(crosvm_reserve_range(vm, PORT, 0x303, 4), EPERM);
  ERR(crosvm_reserve_range(vm, PORT, 0x2fd, 4), EPERM);
  ERR(crosvm_reserve_async_write_range(vm, PORT, 0x301, 1), EPERM);
  ERR(crosvm_reserve_range(vm, 2, 0x300, 4), EINVAL);
  ERR(crosvm_reserve_range(vm, MMIO, ~0ull, 2), EINVAL);
  ERR(crosvm_reserve_range(vm, PORT, 0x301, 0), ENOENT);
  OK(crosvm_reserve_async_write_range(vm, PORT, 0x310, 1));
  OK(crosvm_reserve_range(vm, PORT, 0x400, 4));
  OK(crosvm_reserve_async_write_range(vm, PORT, 0x400, 0)); /* either releases either */
  /* Above the memory. */
  OK(crosvm_reserve_range(vm, MMIO, 0xf0000, 0x80));
  OK(crosvm_reserve_async_write_range(vm, MMIO, 0xf0100, 2));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));

  expect_write(vcpu, PORT, 0x300, 1, 0x44);
  expect_write(vcpu, PORT, 0x300, 2, 0x3344);
  expect_write(vcpu, PORT, 0x300, 4, 0x11223344);
  answer_read(vcpu, PORT, 0x300, 1, 0xa1);
  answer_read(vcpu, PORT, 0x300, 2, 0xb2b1);
  answer_read(vcpu, PORT, 0x300, 4, 0xc4c3c2c1);
  expect_write(vcpu, PORT, 0x303, 4, 0xaabbccdd);
  expect_write(vcpu, MMIO, 0xf0010, 1, 0x66);
  expect_write(vcpu, MMIO, 0xf0011, 2, 0x7788);
  expect_write(vcpu, MMIO, 0xf0014, 4, 0x99aabbcc);
  answer_read(vcpu, MMIO, 0xf0018, 4, 0xd4d3d2d1);
  for (int i = 1; i <= 2; i++) {
    struct crosvm_vcpu_event event = expect_access(vcpu, PORT, 0x310, true, 1);
    SAME(event.io_access.no_resume, 1);
    SAME(*event.io_access.data, i);
  }
  struct crosvm_vcpu_event event = expect_access(vcpu, MMIO, 0xf0100, true, 2);
  SAME(event.io_access.no_resume, 1);
  SAME(number(event), 3);
  expect_write(vcpu, PORT, 0x300, 1, 4);
  const uint8_t answers[] = {0xa1, 0xb1, 0xb2, 0xc1, 0xc2, 0xc3, 0xc4, 0, 0, 0, 0,
                             0xd1, 0xd2, 0xd3, 0xd4, 0,    0,    0,    0};
  for (unsigned i = 0; i < sizeof answers; i++) SAME(memory[0x4000 + i], answers[i]);

  /* The string out comes in as many events as KVM makes of it, whole all together. */
  for (int done = 0; done < 1000;) {
    event = wait_event(vcpu);
    SAME(event.kind, CROSVM_VCPU_EVENT_KIND_IO_ACCESS);
    SAME(event.io_access.address, 0x300);
    CHECK(event.io_access.is_write && event.io_access.length);
    for (unsigned i = 0; i < event.io_access.length; i++)
      SAME(event.io_access.data[i], (uint8_t)((done + i) * 7));
    done += event.io_access.length;
    CHECK(done <= 1000);
    OK(crosvm_vcpu_resume(vcpu));
  }
  int events = 0, done = 0;
  for (; done < 600; events++) {
    event = wait_event(vcpu);
    SAME(event.kind, CROSVM_VCPU_EVENT_KIND_IO_ACCESS);
    CHECK(!event.io_access.is_write);
    for (unsigned i = 0; i < event.io_access.length; i++) event.io_access.data[i] = (done + i) * 3;
    done += event.io_access.length;
    CHECK(done <= 600);
    OK(crosvm_vcpu_resume(vcpu));
  }
  /* String input is one event, or a few large ones where KVM's buffer ends. */
  CHECK(events <= 3);
  expect_write(vcpu, PORT, 0x300, 1, 5);
  for (int i = 0; i < 600; i++) SAME(memory[0x6000 + i], (uint8_t)(i * 3));
  /* In pieces of eight, each an event. */
  for (int i = 0; i < 16; i += 8) {
    uint64_t wanted;
    memcpy(&wanted, memory + 0x4000 + i, 8);
    expect_write(vcpu, MMIO, 0xf0020 + i, 8, wanted);
  }
  answer_read(vcpu, MMIO, 0xf0020, 8, 0x0102030405060708);
  answer_read(vcpu, MMIO, 0xf0028, 8, 0x1112131415161718);
  expect_access(vcpu, PORT, 0x300, true, 1);
  SAME(memory[0x4100], 8);
  SAME(memory[0x4108], 0x18);
  return 0;
}
