/* Several connections: all see what one has made; one that is closed leaves the rest alone. */
#include "harness.h"

GUEST(guest, "1: out %al, $0x80\n jmp 1b");

int main(void) {
  struct crosvm *vm = connect_vm(), *second, *third;
  OK(crosvm_new_connection(vm, &second));
  OK(crosvm_new_connection(second, &third));
  struct crosvm_io *io;
  OK(crosvm_create_io_event(second, PORT, 0x90, 1, NULL, &io));
  OK(crosvm_reserve_range(third, PORT, 0x80, 1));
  ERR(crosvm_reserve_range(vm, PORT, 0x80, 1), EPERM);
  load(third, guest, guest_end);
  OK(crosvm_destroy_connection(&third));
  CHECK(!third);
  CHECK(vcpu_of(vm, 0) == vcpu_of(second, 0));
  struct crosvm_vcpu *vcpu = boot(second);
  OK(crosvm_destroy_connection(&second));
  OK(crosvm_vcpu_resume(vcpu));
  expect_access(vcpu, PORT, 0x80, true, 1);
  OK(crosvm_destroy_io_event(vm, &io));
  /* Each descriptor of the shutdown event is the caller's own, and blocks. */
  int one = OK(crosvm_get_shutdown_eventfd(vm)), two = OK(crosvm_get_shutdown_eventfd(vm));
  CHECK(one != two);
  CHECK(!(fcntl(one, F_GETFL) & O_NONBLOCK));
  uint64_t value = 1;
  CHECK(write(one, &value, 8) == 8);
  CHECK(readable(two, 1000) && read(two, &value, 8) == 8);
  CHECK(!readable(one, 0));
  /* More than a plugin can use, and then again some. */
  struct crosvm *many[80] = {0};
  int n = 0, result = 0;
  while (n < 80 && !(result = crosvm_new_connection(vm, &many[n]))) n++;
  CHECK(n >= 16 && (n == 80 || result == -EMFILE));
  while (n) OK(crosvm_destroy_connection(&many[--n]));
  OK(crosvm_new_connection(vm, &second));
  return 0;
}
