/* How a plugin can end, and what it can do to those it lives with: `life WHAT`. */
#include "harness.h"

GUEST(guest, "mov $1, %al\n out %al, $0x80\n in $0x80, %al\n hlt");
/* Ends the vCPU: an instruction that KVM does not emulate, or, where a CPU runs it, a fault
 * without a handler. */
GUEST(fault, "clac\n lidt 0x4000\n ud2");

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "before")) return 0; /* before it has even connected */
  if (!strcmp(what, "status")) return atoi(argv[2]);
  if (!strcmp(what, "abort")) abort();
  if (!strcmp(what, "stderr")) {
    fprintf(stderr, "first line\n\x1b[31mred\x07\nno end");
    return 0;
  }
  if (!strcmp(what, "flood")) {
    for (int i = 0; i < 200000; i++) fprintf(stderr, "line %d of very many\n", i);
    return 0;
  }
  struct crosvm *vm = connect_vm();
  bool ends = !strncmp(what, "fault", 5);
  load(vm, ends ? fault : guest, ends ? fault_end : guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  int shutdown = OK(crosvm_get_shutdown_eventfd(vm));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));
  if (!strcmp(what, "fault")) { /* told, and out in time */
    uint64_t value;
    CHECK(read(shutdown, &value, 8) == 8);
    return 0;
  }
  if (!strcmp(what, "fault-hang"))
    for (;;) pause();
  if (!strcmp(what, "fault-bad")) {
    uint64_t value;
    CHECK(read(shutdown, &value, 8) == 8);
    return 3;
  }
  expect_access(vcpu, PORT, 0x80, true, 1);
  if (!strcmp(what, "segv")) *(volatile int *)8 = 1;
  if (!strcmp(what, "hang")) { /* with a vCPU that waits for it */
    tell("up");
    for (;;) pause();
  }
  if (!strcmp(what, "serve")) { /* until it is told */
    tell("up");
    uint64_t value;
    CHECK(read(shutdown, &value, 8) == 8);
    return 0;
  }
  FAIL("no such test: %s", what);
}
