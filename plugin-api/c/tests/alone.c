/* What the library says where there is no VMM, and to null pointers. */
#include <crosvm.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int failed;

#define IS(call, errno_)                                                   \
  do {                                                                     \
    int got = (call);                                                      \
    if (got != -(errno_)) {                                                \
      printf("%s is %d instead of -%s (%d)\n", #call, got, #errno_, errno_); \
      failed = 1;                                                          \
    }                                                                      \
  } while (0)

int main(void) {
  struct crosvm *c = NULL;
  struct crosvm_io *io = NULL;
  struct crosvm_irq *irq = NULL;
  struct crosvm_memory *memory = NULL;
  struct crosvm_vcpu *vcpu = NULL;
  struct crosvm_vcpu_event event;
  uint32_t count;
  uint64_t args[4] = {0};
  bool flag;

  unsetenv("CROSVM_SOCKET");
  IS(crosvm_connect(&c), ENOTCONN);
  setenv("CROSVM_SOCKET", "three", 1);
  IS(crosvm_connect(&c), EINVAL);
  setenv("CROSVM_SOCKET", "", 1);
  IS(crosvm_connect(&c), EINVAL);
  IS(crosvm_connect(NULL), EINVAL);
  /* A VMM that is gone. */
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair)) return 2;
  close(pair[1]);
  char number[16];
  snprintf(number, sizeof number, "%d", pair[0]);
  setenv("CROSVM_SOCKET", number, 1);
  IS(crosvm_connect(&c), EPIPE);
  IS(crosvm_get_render_server_fd(), EINVAL);

  IS(crosvm_new_connection(NULL, &c), EINVAL);
  IS(crosvm_destroy_connection(NULL), EINVAL);
  IS(crosvm_destroy_connection(&c), EINVAL);
  IS(crosvm_get_shutdown_eventfd(NULL), EINVAL);
  IS(crosvm_check_extension(NULL, 0, &flag), EINVAL);
  IS(crosvm_enable_capability(NULL, 0, 0, args), EINVAL);
  IS(crosvm_get_supported_cpuid(NULL, 0, NULL, &count), EINVAL);
  IS(crosvm_get_emulated_cpuid(NULL, 0, NULL, &count), EINVAL);
  IS(crosvm_get_msr_index_list(NULL, 0, NULL, &count), EINVAL);
  IS(crosvm_net_get_config(NULL, NULL), EINVAL);
  IS(crosvm_reserve_range(NULL, 0, 0, 1), EINVAL);
  IS(crosvm_reserve_async_write_range(NULL, 0, 0, 1), EINVAL);
  IS(crosvm_set_irq(NULL, 0, true), EINVAL);
  IS(crosvm_set_irq_routing(NULL, 0, NULL), EINVAL);
  IS(crosvm_set_hypercall_hint(NULL, 0, NULL), EINVAL);
  IS(crosvm_get_pic_state(NULL, true, NULL), EINVAL);
  IS(crosvm_set_pic_state(NULL, true, NULL), EINVAL);
  IS(crosvm_get_ioapic_state(NULL, NULL), EINVAL);
  IS(crosvm_set_ioapic_state(NULL, NULL), EINVAL);
  IS(crosvm_get_pit_state(NULL, NULL), EINVAL);
  IS(crosvm_set_pit_state(NULL, NULL), EINVAL);
  IS(crosvm_get_clock(NULL, NULL), EINVAL);
  IS(crosvm_set_clock(NULL, NULL), EINVAL);
  IS(crosvm_set_identity_map_addr(NULL, 0), EINVAL);
  IS(crosvm_pause_vcpus(NULL, 1, NULL), EINVAL);
  IS(crosvm_start(NULL), EINVAL);
  IS(crosvm_create_io_event(NULL, 0, 0, 0, NULL, &io), EINVAL);
  IS(crosvm_destroy_io_event(NULL, &io), EINVAL);
  IS(crosvm_io_event_fd(NULL), EINVAL);
  IS(crosvm_create_memory(NULL, 0, 0, 0, 0, false, false, &memory), EINVAL);
  IS(crosvm_destroy_memory(NULL, &memory), EINVAL);
  IS(crosvm_memory_get_dirty_log(NULL, NULL, NULL), EINVAL);
  IS(crosvm_create_irq_event(NULL, 0, &irq), EINVAL);
  IS(crosvm_destroy_irq_event(NULL, &irq), EINVAL);
  IS(crosvm_irq_event_get_fd(NULL), EINVAL);
  IS(crosvm_irq_event_get_resample_fd(NULL), EINVAL);
  IS(crosvm_get_vcpu(NULL, 0, &vcpu), EINVAL);
  IS(crosvm_get_hyperv_cpuid(NULL, 0, NULL, &count), EINVAL);
  IS(crosvm_vcpu_wait(NULL, &event), EINVAL);
  IS(crosvm_vcpu_resume(NULL), EINVAL);
#define STATE(name)                          \
  IS(crosvm_vcpu_get_##name(NULL, NULL), EINVAL); \
  IS(crosvm_vcpu_set_##name(NULL, NULL), EINVAL)
  STATE(regs);
  STATE(sregs);
  STATE(fpu);
  STATE(debugregs);
  STATE(xcrs);
  STATE(lapic_state);
  STATE(mp_state);
  STATE(vcpu_events);
  IS(crosvm_vcpu_get_msrs(NULL, 0, NULL, &count), EINVAL);
  IS(crosvm_vcpu_set_msrs(NULL, 0, NULL), EINVAL);
  IS(crosvm_vcpu_set_cpuid(NULL, 0, NULL), EINVAL);
  IS(crosvm_vcpu_enable_capability(NULL, 0, 0, args), EINVAL);
  return failed;
}
