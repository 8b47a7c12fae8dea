/* Every error number that the interface has, in the order of its description; what a group of
 * functions refuses besides is in the test of that group. -ENOTCONN and -EINVAL of connect, and
 * -EINVAL for null pointers, need no VMM (plugin-api/c/tests/alone.c); -EPIPE needs one that dies
 * (orphan.c). */
#include "harness.h"

GUEST(guest, "out %al, $0x80\n hlt");

/* The errors of what belongs to a vCPU. */
static void of_vcpu(struct crosvm_vcpu *vcpu) {
  uint64_t args[4] = {0};
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_SPLIT_IRQCHIP, 0, args), EINVAL);
  /* KVM would do these. */
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0, args), EINVAL);
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_ENFORCE_CPUID, 0, args), EINVAL);
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC, 1, args), EINVAL);
  args[3] = 1;
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC2, 0, args), EINVAL);
  struct kvm_xcrs xcrs;
  OK(crosvm_vcpu_get_xcrs(vcpu, &xcrs));
  xcrs.nr_xcrs = KVM_MAX_XCRS + 1;
  ERR(crosvm_vcpu_set_xcrs(vcpu, &xcrs), EINVAL);
  struct kvm_mp_state mp = {.mp_state = 12345};
  ERR(crosvm_vcpu_set_mp_state(vcpu, &mp), EINVAL);
  struct kvm_vcpu_events events;
  OK(crosvm_vcpu_get_vcpu_events(vcpu, &events));
  events.flags = 1u << 31;
  ERR(crosvm_vcpu_set_vcpu_events(vcpu, &events), EINVAL);
  static struct kvm_cpuid_entry2 entries[300];
  ERR(crosvm_vcpu_set_cpuid(vcpu, 300, entries), E2BIG);
  /* An event is not resumed twice, and a second is not waited for while there is one. */
  struct crosvm_vcpu_event event;
  ERR(crosvm_vcpu_wait(vcpu, &event), EPROTO);
}

/* What is only for between wait and resume. */
static void without_event(struct crosvm_vcpu *vcpu) {
  struct kvm_regs regs = {0};
  struct kvm_sregs sregs = {0};
  struct kvm_fpu fpu = {0};
  struct kvm_debugregs debug = {0};
  struct kvm_xcrs xcrs = {0};
  struct kvm_lapic_state lapic = {0};
  struct kvm_mp_state mp = {0};
  struct kvm_vcpu_events events = {0};
  struct kvm_msr_entry msr = {.index = 0x10};
  struct kvm_cpuid_entry2 entry = {0};
  uint64_t args[4] = {0};
  uint32_t count;
#define BOTH(name, state)                          \
  ERR(crosvm_vcpu_get_##name(vcpu, state), EPROTO); \
  ERR(crosvm_vcpu_set_##name(vcpu, state), EPROTO)
  BOTH(regs, &regs);
  BOTH(sregs, &sregs);
  BOTH(fpu, &fpu);
  BOTH(debugregs, &debug);
  BOTH(xcrs, &xcrs);
  BOTH(lapic_state, &lapic);
  BOTH(mp_state, &mp);
  BOTH(vcpu_events, &events);
  ERR(crosvm_vcpu_get_msrs(vcpu, 1, &msr, &count), EPROTO);
  ERR(crosvm_vcpu_set_msrs(vcpu, 1, &msr), EPROTO);
  ERR(crosvm_vcpu_set_cpuid(vcpu, 1, &entry), EPROTO);
  ERR(crosvm_get_hyperv_cpuid(vcpu, 1, &entry, &count), EPROTO);
  ERR(crosvm_vcpu_enable_capability(vcpu, KVM_CAP_HYPERV_SYNIC, 0, args), EPROTO);
  ERR(crosvm_vcpu_resume(vcpu), EPROTO);
}

int main(void) {
  struct crosvm *vm = connect_vm();
  struct crosvm_vcpu *vcpu = vcpu_of(vm, 0), *past;
  without_event(vcpu);

  /* enable_capability: always. */
  uint64_t args[4] = {0};
  ERR(crosvm_enable_capability(vm, KVM_CAP_SPLIT_IRQCHIP, 0, args), EINVAL);
  ERR(crosvm_enable_capability(vm, 0, 0, args), EINVAL);
  /* Lists: the count is there all the same. */
  static struct kvm_cpuid_entry2 entries[512];
  uint32_t index, count = 0;
  ERR(crosvm_get_supported_cpuid(vm, 1, entries, &count), E2BIG);
  CHECK(count > 1);
  count = 0;
  ERR(crosvm_get_msr_index_list(vm, 1, &index, &count), E2BIG);
  CHECK(count > 1);
  /* reserve_range, and its twin. */
  int (*reserve[])(struct crosvm *, uint32_t, uint64_t, uint64_t) = {
      crosvm_reserve_range, crosvm_reserve_async_write_range};
  for (int i = 0; i < 2; i++) {
    ERR(reserve[i](vm, 2, 0x100, 1), EINVAL);
    ERR(reserve[i](vm, MMIO, ~0ull, 2), EINVAL);
    OK(reserve[i](vm, MMIO, ~0ull, 1));
    ERR(reserve[i](vm, PORT, 0x100, 0), ENOENT);
    OK(reserve[i](vm, PORT, 0x100, 4));
    ERR(reserve[0](vm, PORT, 0x103, 2), EPERM); /* its last is the other's first */
    ERR(reserve[1](vm, PORT, 0xff, 2), EPERM);
    ERR(reserve[i](vm, PORT, 0x101, 0), ENOENT);
    OK(reserve[1 - i](vm, PORT, 0x100, 0));
    OK(reserve[1 - i](vm, MMIO, ~0ull, 0));
  }
  /* Hints. */
  static struct crosvm_hint_detail details[33];
  const struct crosvm_hint good = {.address = 1, .details = details, .details_count = 32};
  OK(crosvm_set_hypercall_hint(vm, 1, &good));
  ERR(crosvm_set_hypercall_hint(vm, 2, &good), EINVAL);
  struct crosvm_hint bad[] = {good, good, good, good, good, good};
  bad[0].hint_version = 1;
  bad[1]._reserved = 1;
  bad[2].address = 0;
  bad[3].address_flags = 2;
  bad[4].details_count = 33;
  bad[5].address_space = 2;
  for (int i = 0; i < 6; i++) ERR(crosvm_set_hypercall_hint(vm, 1, &bad[i]), EINVAL);
  /* create_memory, in its order: each has what is refused later as well. */
  struct crosvm_memory *memory = NULL, *other = NULL;
  const uint64_t MIB = 1 << 20, TOP = ~0xfffull;
  int event = eventfd(0, 0), fd = memory_fd(MIB), plain = memfd_create("p", MFD_ALLOW_SEALING);
  CHECK(!ftruncate(plain, MIB));
#define CREATE(fd, offset, length) crosvm_create_memory(vm, fd, offset, length, 0, false, false, &memory)
  ERR(CREATE(-1, 1, TOP), EINVAL);
  ERR(CREATE(-1, TOP, 1), EINVAL);
  ERR(CREATE(-1, TOP, TOP), EBADF);
  ERR(CREATE(event, TOP, TOP), EINVAL);
  ERR(CREATE(plain, TOP, TOP), EPERM);
  ERR(CREATE(fd, TOP, 8192), EOVERFLOW);
  ERR(CREATE(fd, MIB, 4096), EINVAL);
  ERR(CREATE(fd, 0, 0), EINVAL);
  OK(CREATE(fd, 0, MIB));
  ERR(crosvm_create_memory(vm, fd, 0, 4096, MIB - 4096, false, false, &other), EEXIST);
  uint8_t log[32];
  ERR(crosvm_memory_get_dirty_log(vm, memory, log), ENOENT);
  /* io events. */
  struct crosvm_io *io = NULL, *gone;
  const uint32_t lengths[] = {3, 5, 6, 7, 9, 16, ~0u};
  for (int i = 0; i < 7; i++) ERR(crosvm_create_io_event(vm, PORT, 0x10, lengths[i], NULL, &io), EINVAL);
  ERR(crosvm_create_io_event(vm, 2, 0x10, 1, NULL, &io), EINVAL);
  /* destroy_*: what there is not, and what there was. */
  struct crosvm_irq *irq = NULL, *gone_irq;
  ERR(crosvm_destroy_io_event(vm, &io), ENOENT);
  ERR(crosvm_destroy_irq_event(vm, &irq), ENOENT);
  ERR(crosvm_destroy_memory(vm, &other), ENOENT);
  OK(crosvm_create_io_event(vm, PORT, 0x10, 8, NULL, &io)); /* no data to compare is any data */
  OK(crosvm_create_irq_event(vm, 5, &irq));
  gone = io, gone_irq = irq;
  OK(crosvm_destroy_io_event(vm, &io));
  OK(crosvm_destroy_irq_event(vm, &irq));
  ERR(crosvm_destroy_io_event(vm, &gone), ENOENT);
  ERR(crosvm_destroy_irq_event(vm, &gone_irq), ENOENT);
  /* Routes. */
  struct crosvm_irq_route route = {.irq_id = 1, .kind = 2};
  ERR(crosvm_set_irq_routing(vm, 1, &route), EINVAL);
  ERR(crosvm_set_irq_routing(vm, 1, NULL), EINVAL);
  /* No network, no such vCPU. */
  struct crosvm_net_config net;
  ERR(crosvm_net_get_config(vm, &net), ENODATA);
  ERR(crosvm_get_vcpu(vm, 1, &past), ENOENT);
  ERR(crosvm_get_vcpu(vm, ~0u, &past), ENOENT);
  ERR(crosvm_get_render_server_fd(), EINVAL);

  memcpy(map(fd, MIB) + CODE, guest, guest_end - guest);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  CHECK(boot(vm) == vcpu);
  ERR(crosvm_start(vm), EINVAL);
  of_vcpu(vcpu);
  /* What is set at the resume is refused by the call that can say so. */
  struct kvm_debugregs debug;
  OK(crosvm_vcpu_get_debugregs(vcpu, &debug));
  debug.flags = 1;
  OK(crosvm_vcpu_set_debugregs(vcpu, &debug));
  OK(crosvm_vcpu_resume(vcpu));
  struct crosvm_vcpu_event next;
  ERR(crosvm_vcpu_wait(vcpu, &next), EINVAL);
  without_event(vcpu);
  expect_access(vcpu, PORT, 0x80, true, 1);
  of_vcpu(vcpu);
  return 0;
}
