/* Hints: registers that come along with an access, so that getting and setting them needs
 * no VMM. The test stops the VMM by SIGSTOP in between. */
#include "harness.h"

GUEST(guest,
      "mov $0x11, %eax\n mov $0x22, %ebx\n mov $0x33, %ecx\n mov $0x600, %dx\n"
      "out %al, %dx\n mov $0x12, %eax\n out %al, %dx\n in %dx, %al\n"
      "mov %ebx, %eax\n mov $0x601, %dx\n out %eax, %dx\n hlt");

int main(void) {
  struct crosvm *vm = connect_vm();
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x600, 8));
  static struct crosvm_hint_detail details[33];
  struct crosvm_hint hint = {.address_space = PORT, .address_flags = CROSVM_HINT_ON_WRITE,
                             .address = 0x600, .details = details, .details_count = 2};
#define BAD(field, value)                            \
  do {                                               \
    struct crosvm_hint bad = hint;                   \
    bad.field = value;                               \
    ERR(crosvm_set_hypercall_hint(vm, 1, &bad), EINVAL); \
  } while (0)
  BAD(hint_version, 1);
  BAD(_reserved, 1);
  BAD(address_space, 2);
  BAD(address_flags, 3);
  BAD(address, 0);
  BAD(details_count, 33);
  BAD(details, NULL);
  ERR(crosvm_set_hypercall_hint(vm, 2, &hint), EINVAL);
  ERR(crosvm_set_hypercall_hint(vm, 1, NULL), EINVAL);
  OK(crosvm_set_hypercall_hint(vm, 0, NULL));
  /* The first that holds decides: not the first here, at the first access; both comparisons
   * of the second. */
  details[0] = (struct crosvm_hint_detail){.match_rax = true, .rax = 0x12, .match_rbx = true,
                                           .rbx = 0x22, .send_debugregs = true};
  details[1] = (struct crosvm_hint_detail){.match_rax = true, .rax = 0x11, .match_rcx = true,
                                           .rcx = 0x33, .send_sregs = true};
  OK(crosvm_set_hypercall_hint(vm, 1, &hint));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));

  struct kvm_regs regs;
  struct kvm_sregs sregs;
  struct kvm_debugregs debug;
  expect_access(vcpu, PORT, 0x600, true, 1);
  tell("stop");
  hear("stopped");
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  SAME(regs.rax, 0x11);
  SAME(regs.rcx, 0x33);
  OK(crosvm_vcpu_get_sregs(vcpu, &sregs));
  SAME(sregs.cs.selector, 0);
  regs.rbx = 0x22;
  OK(crosvm_vcpu_set_regs(vcpu, &regs));
  OK(crosvm_vcpu_set_sregs(vcpu, &sregs));
  regs.rbx = 0;
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  SAME(regs.rbx, 0x22);
  OK(crosvm_vcpu_resume(vcpu));
  tell("go");
  hear("gone");
  expect_access(vcpu, PORT, 0x600, true, 1);
  tell("stop");
  hear("stopped");
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  SAME(regs.rax, 0x12);
  OK(crosvm_vcpu_get_debugregs(vcpu, &debug));
  regs.rbx = 0x5678;
  OK(crosvm_vcpu_set_regs(vcpu, &regs));
  OK(crosvm_vcpu_resume(vcpu));
  tell("go");
  hear("gone");
  /* A read is not what was hinted at; it works as ever. */
  answer_read(vcpu, PORT, 0x600, 1, 1);
  expect_write(vcpu, PORT, 0x601, 4, 0x5678);
  return 0;
}
