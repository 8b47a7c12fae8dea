/* The state of the interrupt controllers, the timer and the clock. */
#include "harness.h"

GUEST(guest, "mov $1, %al\n out %al, $0x80\n hlt");

static void chips(struct crosvm *vm) {
  struct kvm_pic_state pic, other, again;
  OK(crosvm_get_pic_state(vm, true, &pic));
  OK(crosvm_get_pic_state(vm, false, &other));
  pic.imr = 0xa5;
  pic.irq_base = 0x40;
  other.imr = 0x5a;
  OK(crosvm_set_pic_state(vm, true, &pic));
  OK(crosvm_set_pic_state(vm, false, &other));
  OK(crosvm_get_pic_state(vm, true, &again));
  CHECK(again.imr == 0xa5 && again.irq_base == 0x40);
  OK(crosvm_get_pic_state(vm, false, &again));
  CHECK(again.imr == 0x5a);

  struct kvm_ioapic_state ioapic, ioapic2;
  OK(crosvm_get_ioapic_state(vm, &ioapic));
  ioapic.redirtbl[3].bits = 0x10000 | 0x33;
  OK(crosvm_set_ioapic_state(vm, &ioapic));
  OK(crosvm_get_ioapic_state(vm, &ioapic2));
  SAME(ioapic2.redirtbl[3].bits, 0x10000 | 0x33);
  SAME(ioapic2.base_address, 0xfec00000);

  struct kvm_pit_state2 pit, pit2;
  OK(crosvm_get_pit_state(vm, &pit));
  pit.channels[2].count = 0x1234;
  pit.channels[2].mode = 3;
  OK(crosvm_set_pit_state(vm, &pit));
  OK(crosvm_get_pit_state(vm, &pit2));
  SAME(pit2.channels[2].count, 0x1234);
  SAME(pit2.channels[2].mode, 3);

  struct kvm_clock_data clock = {.clock = 1000000000000ull}, clock2;
  OK(crosvm_set_clock(vm, &clock));
  OK(crosvm_get_clock(vm, &clock2));
  CHECK(clock2.clock >= clock.clock && clock2.clock < clock.clock + 60000000000ull);
  usleep(2000);
  OK(crosvm_get_clock(vm, &clock));
  CHECK(clock.clock > clock2.clock);
}

int main(void) {
  struct crosvm *vm = connect_vm();
  bool has = false;
  OK(crosvm_check_extension(vm, KVM_CAP_IRQCHIP, &has));
  CHECK(has);
  /* Answers a number of slots, not 1. */
  OK(crosvm_check_extension(vm, KVM_CAP_NR_MEMSLOTS, &has));
  CHECK(!has);
  OK(crosvm_check_extension(vm, 99999, &has));
  CHECK(!has);
  uint64_t args[4] = {0};
  ERR(crosvm_enable_capability(vm, KVM_CAP_SPLIT_IRQCHIP, 0, args), EINVAL);
  struct crosvm_net_config net;
  ERR(crosvm_net_get_config(vm, &net), ENODATA);
  OK(crosvm_set_identity_map_addr(vm, 0xfffbc000));
  chips(vm);
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  struct crosvm_vcpu *vcpu = boot(vm);
  ERR(crosvm_start(vm), EINVAL);
  chips(vm);
  OK(crosvm_vcpu_resume(vcpu));
  expect_write(vcpu, PORT, 0x80, 1, 1);
  chips(vm);
  return 0;
}
