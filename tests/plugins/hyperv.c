/* Hyper-V: hypercalls and the synthetic interrupt controller. For a real CPU: see
 * tests/nested. */
#include "harness.h"

/* 32-bit protected mode: a hypercall from real mode is an invalid instruction. */
extern const uint8_t guest[], guest_end[];
asm(".pushsection .rodata\n.code32\nguest:\n"
    "mov $0x40000000, %ecx\n mov $1, %eax\n mov $0x81000000, %edx\n wrmsr\n" /* who we are */
    "xor %edx, %edx\n inc %ecx\n mov $0x5001, %eax\n wrmsr\n"                  /* hypercalls on */
    "mov $0x40000083, %ecx\n mov $0x6001, %eax\n wrmsr\n"                     /* message page */
    "mov $0x40000080, %ecx\n mov $1, %eax\n wrmsr\n"                          /* controller on */
    "mov $0x5c, %eax\n xor %edx, %edx\n mov $1, %ebx\n mov $0x7000, %ecx\n mov $2, %edi\n"
    "mov $0x7800, %esi\n vmmcall\n out %eax, $0x80\n mov %edx, %eax\n out %eax, $0x80\n hlt\n"
    "guest_end:\n.code64\n.popsection");

int main(void) {
  struct crosvm *vm = connect_vm();
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 4));
  struct crosvm_vcpu *vcpu = boot(vm);
  static struct kvm_cpuid_entry2 entries[512];
  uint32_t count, more;
  uint64_t args[4] = {0};
  OK(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC2, 0, args));
  OK(crosvm_get_supported_cpuid(vm, 256, entries, &count));
  uint32_t n = 0;
  for (uint32_t i = 0; i < count; i++)
    if (entries[i].function >> 28 != 4) entries[n++] = entries[i];
  OK(crosvm_get_hyperv_cpuid(vcpu, 512 - n, entries + n, &more));
  OK(crosvm_vcpu_set_cpuid(vcpu, n + more, entries));
  struct kvm_sregs sregs;
  OK(crosvm_vcpu_get_sregs(vcpu, &sregs));
  struct kvm_segment flat = {.limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
  sregs.cs = flat;
  flat.type = 3;
  flat.selector = 16;
  sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
  sregs.cr0 |= 1;
  OK(crosvm_vcpu_set_sregs(vcpu, &sregs));
  OK(crosvm_vcpu_resume(vcpu));

  struct crosvm_vcpu_event event = wait_event(vcpu);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_HYPERV_SYNIC);
  SAME(event.hyperv_synic.msr, 0x40000083);
  SAME(event.hyperv_synic.msg_page, 0x6001);
  OK(crosvm_vcpu_resume(vcpu));
  event = wait_event(vcpu);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_HYPERV_SYNIC);
  SAME(event.hyperv_synic.msr, 0x40000080);
  SAME(event.hyperv_synic.control, 1);
  OK(crosvm_vcpu_resume(vcpu));
  event = wait_event(vcpu);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_HYPERV_HCALL);
  SAME(event.hyperv_call.input, 0x5c);
  SAME(event.hyperv_call.params[0], 0x100007000);
  SAME(event.hyperv_call.params[1], 0x200007800);
  SAME(*event.hyperv_call.result, 0);
  *event.hyperv_call.result = 0x1234567800000042;
  OK(crosvm_vcpu_resume(vcpu));
  expect_write(vcpu, PORT, 0x80, 4, 0x42);
  expect_write(vcpu, PORT, 0x80, 4, 0x12345678);
  return 0;
}
