/* The state of a vCPU: what is set at the resume, what at once, and when neither may be. */
#include "harness.h"

/* Says what is in the registers. */
GUEST(guest,
      "1: out %eax, $0x80\n mov %ebx, %eax\n out %eax, $0x80\n mov %ds, %ax\n out %ax, $0x80\n"
      "jmp 1b");

static void none(struct crosvm_vcpu *vcpu) {
  struct kvm_regs regs = {0};
  struct kvm_sregs sregs = {0};
  struct kvm_fpu fpu = {0};
  struct kvm_mp_state mp = {0};
  struct kvm_msr_entry msr = {.index = 0x10};
  uint32_t count;
  ERR(crosvm_vcpu_resume(vcpu), EPROTO);
  ERR(crosvm_vcpu_get_regs(vcpu, &regs), EPROTO);
  ERR(crosvm_vcpu_set_regs(vcpu, &regs), EPROTO);
  ERR(crosvm_vcpu_get_sregs(vcpu, &sregs), EPROTO);
  ERR(crosvm_vcpu_set_sregs(vcpu, &sregs), EPROTO);
  ERR(crosvm_vcpu_get_fpu(vcpu, &fpu), EPROTO);
  ERR(crosvm_vcpu_set_mp_state(vcpu, &mp), EPROTO);
  ERR(crosvm_vcpu_get_msrs(vcpu, 1, &msr, &count), EPROTO);
}

int main(void) {
  struct crosvm *vm = connect_vm();
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 4));
  struct crosvm_vcpu *vcpu = vcpu_of(vm, 0), *past = NULL;
  ERR(crosvm_get_vcpu(vm, 1, &past), ENOENT);
  ERR(crosvm_get_vcpu(vm, ~0u, &past), ENOENT);
  none(vcpu);
  vcpu = boot(vm);
  struct crosvm_vcpu_event event;
  ERR(crosvm_vcpu_wait(vcpu, &event), EPROTO);
  struct kvm_regs regs, regs2;
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  SAME(regs.rip, CODE); /* as it was set, before the resume */
  regs.rax = 0x11112222;
  regs.rbx = 0x33334444;
  OK(crosvm_vcpu_set_regs(vcpu, &regs));
  struct kvm_sregs sregs, sregs2;
  OK(crosvm_vcpu_get_sregs(vcpu, &sregs));
  sregs.ds.selector = 0x70;
  sregs.ds.base = 0x700;
  OK(crosvm_vcpu_set_sregs(vcpu, &sregs));
  struct kvm_debugregs debug, debug2;
  OK(crosvm_vcpu_get_debugregs(vcpu, &debug));
  debug.db[0] = 0x1234;
  OK(crosvm_vcpu_set_debugregs(vcpu, &debug));
  OK(crosvm_vcpu_get_debugregs(vcpu, &debug2));
  SAME(debug2.db[0], 0x1234);

  struct kvm_fpu fpu, fpu2;
  OK(crosvm_vcpu_get_fpu(vcpu, &fpu));
  fpu.fcw = 0x27f;
  memset(fpu.xmm[3], 0x5c, 16);
  OK(crosvm_vcpu_set_fpu(vcpu, &fpu));
  OK(crosvm_vcpu_get_fpu(vcpu, &fpu2));
  SAME(fpu2.fcw, 0x27f);
  CHECK(!memcmp(fpu2.xmm[3], fpu.xmm[3], 16));
  struct kvm_xcrs xcrs, xcrs2;
  OK(crosvm_vcpu_get_xcrs(vcpu, &xcrs));
  CHECK(xcrs.nr_xcrs >= 1);
  xcrs.xcrs[0].value = 1;
  OK(crosvm_vcpu_set_xcrs(vcpu, &xcrs));
  OK(crosvm_vcpu_get_xcrs(vcpu, &xcrs2));
  SAME(xcrs2.xcrs[0].value, 1);
  xcrs.xcrs[0].value = 0; /* x87 cannot be off */
  ERR(crosvm_vcpu_set_xcrs(vcpu, &xcrs), EINVAL);
  struct kvm_lapic_state lapic, lapic2;
  OK(crosvm_vcpu_get_lapic_state(vcpu, &lapic));
  lapic.regs[0x80] = 0x20; /* task priority */
  OK(crosvm_vcpu_set_lapic_state(vcpu, &lapic));
  OK(crosvm_vcpu_get_lapic_state(vcpu, &lapic2));
  SAME(lapic2.regs[0x80], 0x20);
  struct kvm_mp_state mp;
  OK(crosvm_vcpu_get_mp_state(vcpu, &mp));
  SAME(mp.mp_state, KVM_MP_STATE_RUNNABLE);
  OK(crosvm_vcpu_set_mp_state(vcpu, &mp));
  mp.mp_state = 77;
  ERR(crosvm_vcpu_set_mp_state(vcpu, &mp), EINVAL);
  struct kvm_vcpu_events events, events2;
  OK(crosvm_vcpu_get_vcpu_events(vcpu, &events));
  events.nmi.masked = 1;
  events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
  OK(crosvm_vcpu_set_vcpu_events(vcpu, &events));
  OK(crosvm_vcpu_get_vcpu_events(vcpu, &events2));
  SAME(events2.nmi.masked, 1);
  struct kvm_msr_entry msrs[3] = {{.index = 0x174, .data = 0x10}, {.index = 0x175, .data = 0x2000},
                                  {.index = 0x176, .data = 0x3000}};
  uint32_t count = 0;
  OK(crosvm_vcpu_set_msrs(vcpu, 3, msrs));
  memset(msrs, 0, sizeof msrs);
  msrs[0].index = 0x175;
  msrs[1].index = 0x4b564dff; /* no such MSR: the answer ends before it */
  msrs[2].index = 0x176;
  OK(crosvm_vcpu_get_msrs(vcpu, 3, msrs, &count));
  SAME(count, 1);
  SAME(msrs[0].data, 0x2000);
  uint64_t args[4] = {0};
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_IRQCHIP, 0, args), EINVAL);
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC, 1, args), EINVAL);
  args[2] = 1;
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC2, 0, args), EINVAL);

  OK(crosvm_vcpu_resume(vcpu));
  expect_write(vcpu, PORT, 0x80, 4, 0x11112222);
  expect_write(vcpu, PORT, 0x80, 4, 0x33334444);
  expect_write(vcpu, PORT, 0x80, 2, 0x70);
  expect_access(vcpu, PORT, 0x80, true, 4);
  OK(crosvm_vcpu_get_regs(vcpu, &regs2));
  SAME(regs2.rbx, 0x33334444);
  OK(crosvm_vcpu_get_sregs(vcpu, &sregs2));
  SAME(sregs2.ds.selector, 0x70);
  OK(crosvm_vcpu_get_debugregs(vcpu, &debug2));
  SAME(debug2.db[0], 0x1234);
  /* What KVM refuses at the resume is told by the next wait, and the event comes after. */
  sregs2.cr4 |= 1ull << 63;
  OK(crosvm_vcpu_set_sregs(vcpu, &sregs2));
  OK(crosvm_vcpu_resume(vcpu));
  ERR(crosvm_vcpu_wait(vcpu, &event), EINVAL);
  none(vcpu);
  wait_event(vcpu);
  OK(crosvm_vcpu_get_regs(vcpu, &regs2));
  return 0;
}
