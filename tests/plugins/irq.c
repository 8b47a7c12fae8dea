/* Interrupts: lines, irqfds with their resample event, routes. */
#include "harness.h"

/* Vector 0x24 (line 4 of the PIC, moved to 0x20) says 0x44 on the port and ends the
 * interrupt. Vector 0x25 the same with 0x45. Then it halts, for ever. */
GUEST(guest,
      "cli\n xor %ax, %ax\n mov %ax, %ds\n"
      "movw $(0x1000 + four - guest), 4*0x24\n mov %ax, 4*0x24+2\n"
      "movw $(0x1000 + five - guest), 4*0x25\n mov %ax, 4*0x25+2\n"
      "mov $0x11, %al\n out %al, $0x20\n out %al, $0xa0\n mov $0x20, %al\n out %al, $0x21\n"
      "mov $0x28, %al\n out %al, $0xa1\n mov $4, %al\n out %al, $0x21\n mov $2, %al\n out %al, $0xa1\n"
      "mov $1, %al\n out %al, $0x21\n out %al, $0xa1\n mov $0xcf, %al\n out %al, $0x21\n"
      "mov $0xff, %al\n out %al, $0xa1\n mov $1, %al\n out %al, $0x80\n sti\n"
      "1: hlt\n jmp 1b\n"
      "four: mov $0x44, %al\n out %al, $0x80\n mov $0x20, %al\n out %al, $0x20\n iret\n"
      "five: mov $0x45, %al\n out %al, $0x80\n mov $0x20, %al\n out %al, $0x20\n iret");

int main(void) {
  struct crosvm *vm = connect_vm();
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  struct crosvm_irq_route routes[300] = {
      {.irq_id = 4, .kind = CROSVM_IRQ_ROUTE_IRQCHIP, .irqchip = {.irqchip = 0, .pin = 4}},
      {.irq_id = 30, .kind = CROSVM_IRQ_ROUTE_IRQCHIP, .irqchip = {.irqchip = 0, .pin = 5}},
      {.irq_id = 31, .kind = 2},
  };
  ERR(crosvm_set_irq_routing(vm, 3, routes), EINVAL);
  ERR(crosvm_set_irq_routing(vm, 1, NULL), EINVAL);
  OK(crosvm_set_irq_routing(vm, 0, NULL));
  /* More than the original's messages could hold. */
  for (int i = 2; i < 300; i++)
    routes[i] = (struct crosvm_irq_route){.irq_id = 40 + i,
                                          .kind = CROSVM_IRQ_ROUTE_MSI,
                                          .msi = {.address = 0xfee00000, .data = 0x30}};
  OK(crosvm_set_irq_routing(vm, 300, routes));
  struct crosvm_irq *four = NULL, *thirty;
  ERR(crosvm_destroy_irq_event(vm, &four), ENOENT);
  OK(crosvm_create_irq_event(vm, 4, &four));
  OK(crosvm_create_irq_event(vm, 30, &thirty));
  CHECK(crosvm_irq_event_get_fd(four) >= 0 && crosvm_irq_event_get_resample_fd(four) >= 0);

  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));
  expect_write(vcpu, PORT, 0x80, 1, 1);
  /* By event. */
  const uint64_t one = 1;
  uint64_t value;
  CHECK(write(crosvm_irq_event_get_fd(four), &one, 8) == 8);
  expect_write(vcpu, PORT, 0x80, 1, 0x44);
  int resample = crosvm_irq_event_get_resample_fd(four);
  CHECK(readable(resample, 10000) && read(resample, &value, 8) == 8);
  /* By the table: interrupt 30 is line 5. */
  CHECK(write(crosvm_irq_event_get_fd(thirty), &one, 8) == 8);
  expect_write(vcpu, PORT, 0x80, 1, 0x45);
  /* By level, once the event has let go of the line. */
  resample = crosvm_irq_event_get_resample_fd(thirty);
  CHECK(readable(resample, 10000) && read(resample, &value, 8) == 8);
  OK(crosvm_set_irq(vm, 30, true));
  OK(crosvm_set_irq(vm, 30, false));
  expect_write(vcpu, PORT, 0x80, 1, 0x45);
  struct crosvm_irq *gone = thirty;
  int old = dup(crosvm_irq_event_get_fd(thirty));
  OK(crosvm_destroy_irq_event(vm, &thirty));
  CHECK(!thirty);
  ERR(crosvm_destroy_irq_event(vm, &gone), ENOENT);
  /* It raises nothing any more: of the two, only what is the other's comes. */
  CHECK(write(old, &one, 8) == 8);
  for (int i = 0; i < 3; i++) {
    CHECK(write(crosvm_irq_event_get_fd(four), &one, 8) == 8);
    expect_write(vcpu, PORT, 0x80, 1, 0x44);
    resample = crosvm_irq_event_get_resample_fd(four);
    CHECK(readable(resample, 10000) && read(resample, &value, 8) == 8);
  }
  OK(crosvm_destroy_irq_event(vm, &four));
  return 0;
}
