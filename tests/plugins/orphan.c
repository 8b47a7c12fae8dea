/* Attached by `orphan SOCKET` to a VM whose VMM is stopped and then killed: whatever a thread is in
 * the middle of ends with -EPIPE, and so does every call after that. */
#include "harness.h"

#include <sys/socket.h>
#include <sys/un.h>

static struct crosvm *second;
static struct crosvm_vcpu *held, *free_one;

/* Waits for an event that does not come. */
static void *wait_for_event(void *unused) {
  (void)unused;
  struct crosvm_vcpu_event event;
  ERR(crosvm_vcpu_wait(free_one, &event), EPIPE);
  return NULL;
}

/* Asks for what only the VMM knows, of a vCPU that is held. */
static void *ask_vcpu(void *unused) {
  (void)unused;
  struct kvm_fpu fpu;
  int result;
  while (!(result = crosvm_vcpu_get_fpu(held, &fpu)))
    ;
  SAME(-result, EPIPE);
  return NULL;
}

/* Asks the VMM. */
static void *ask_vm(void *unused) {
  (void)unused;
  bool has;
  int result;
  while (!(result = crosvm_check_extension(second, KVM_CAP_IRQCHIP, &has)))
    ;
  SAME(-result, EPIPE);
  return NULL;
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  /* The way in is the socket; from there on it is the same interface. */
  int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
  CHECK(!connect(fd, (struct sockaddr *)&address, sizeof address));
  char number[16];
  snprintf(number, sizeof number, "%d", fd);
  setenv("CROSVM_SOCKET", number, 1);
  struct crosvm *vm = connect_vm();
  close(fd);
  OK(crosvm_new_connection(vm, &second));
  held = vcpu_of(vm, 0);
  free_one = vcpu_of(vm, 1);
  OK(crosvm_pause_vcpus(vm, 1, (void *)7));
  struct crosvm_vcpu_event event = wait_event(held);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_PAUSED);
  struct kvm_regs regs;
  OK(crosvm_vcpu_get_regs(held, &regs));

  pthread_t threads[3];
  CHECK(!pthread_create(&threads[0], NULL, wait_for_event, NULL));
  CHECK(!pthread_create(&threads[1], NULL, ask_vcpu, NULL));
  CHECK(!pthread_create(&threads[2], NULL, ask_vm, NULL));
  tell("busy");
  for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);

  bool has;
  struct kvm_fpu fpu;
  struct crosvm *third;
  ERR(crosvm_check_extension(vm, KVM_CAP_IRQCHIP, &has), EPIPE);
  ERR(crosvm_new_connection(vm, &third), EPIPE);
  ERR(crosvm_get_shutdown_eventfd(vm), EPIPE);
  ERR(crosvm_pause_vcpus(vm, 1, NULL), EPIPE);
  ERR(crosvm_vcpu_get_fpu(held, &fpu), EPIPE);
  /* Known without the VMM, and let go for nobody. */
  OK(crosvm_vcpu_get_regs(held, &regs));
  OK(crosvm_vcpu_resume(held));
  ERR(crosvm_vcpu_wait(held, &event), EPIPE);
  ERR(crosvm_vcpu_wait(free_one, &event), EPIPE);
  OK(crosvm_destroy_connection(&second));
  OK(crosvm_destroy_connection(&vm));
  tell("ended");
  return 0;
}
