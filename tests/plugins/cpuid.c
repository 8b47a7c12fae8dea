/* Lists: cpuid and MSRs, their buffers, and what a vCPU takes. */
#include "harness.h"

GUEST(guest, "mov $0x40000000, %eax\n cpuid\n xchg %eax, %ebx\n out %eax, $0x80\n hlt");

int main(int argc, char **argv) {
  (void)argv;
  struct crosvm *vm = connect_vm();
  static struct kvm_cpuid_entry2 entries[1024];
  static uint32_t indices[4096];
  uint32_t count = 0, again = 0;
  ERR(crosvm_get_supported_cpuid(vm, 1, entries, &count), E2BIG);
  CHECK(count > 1 && count <= 1024);
  OK(crosvm_get_supported_cpuid(vm, count, entries, &again));
  SAME(count, again);
  bool vendor = false;
  for (uint32_t i = 0; i < count; i++) vendor |= !entries[i].function && entries[i].ebx;
  CHECK(vendor);
  ERR(crosvm_get_supported_cpuid(vm, count, NULL, &again), EINVAL);
  ERR(crosvm_get_supported_cpuid(vm, count, entries, NULL), EINVAL);
  int result = crosvm_get_emulated_cpuid(vm, 1024, entries, &again);
  CHECK(!result && again <= 1024);
  if (again) ERR(crosvm_get_emulated_cpuid(vm, 0, NULL, &count), E2BIG);
  ERR(crosvm_get_msr_index_list(vm, 0, indices, &count), E2BIG);
  OK(crosvm_get_msr_index_list(vm, 4096, indices, &again));
  SAME(count, again);
  CHECK(count > 10);

  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 4));
  struct crosvm_vcpu *vcpu = boot(vm);
  result = crosvm_get_hyperv_cpuid(vcpu, 1024, entries, &count);
  bool hyperv = false;
  OK(crosvm_check_extension(vm, KVM_CAP_HYPERV_CPUID, &hyperv));
  if (hyperv) {
    CHECK(!result && count > 3);
    ERR(crosvm_get_hyperv_cpuid(vcpu, 1, entries, &again), E2BIG);
    SAME(count, again);
  }
  OK(crosvm_get_supported_cpuid(vm, 1024, entries, &count));
  /* One entry of our own. Its index is no part of its name, whatever it is. */
  uint32_t n = 0;
  for (uint32_t i = 0; i < count; i++)
    if (entries[i].function < 0x40000000 || entries[i].function > 0x4fffffff) entries[n++] = entries[i];
  entries[n++] = (struct kvm_cpuid_entry2){.function = 0x40000000, .index = 9, .eax = 0x40000000,
                                           .ebx = 0x6c6c6563};
  OK(crosvm_vcpu_set_cpuid(vcpu, n, entries));
  OK(crosvm_vcpu_resume(vcpu));
  struct crosvm_vcpu_event event = expect_access(vcpu, PORT, 0x80, true, 4);
  /* Only a real CPU hides what it is told to: `cpuid strict`. */
  if (argc > 1) SAME(number(event), 0x6c6c6563);
  return 0;
}
