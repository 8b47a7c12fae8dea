/* Pausing: before there are vCPUs, before they run, while they run, halt, wait for an answer,
 * are paused, and are about to leave a pause. */
#include "harness.h"

/* Counts; a write to the port every 65536 rounds. With interrupts off and nothing to do it
 * halts when told to. */
GUEST(guest,
      "xor %ecx, %ecx\n 1: inc %ecx\n mov %ecx, 0x4000\n cmpb $0, 0x4004\n je 2f\n cli\n hlt\n"
      "2: cmpb $0, 0x4005\n je 1b\n in $0x80, %al\n movb $0, 0x4005\n jmp 1b");

static struct crosvm_vcpu_event paused(struct crosvm_vcpu *vcpu, uintptr_t user) {
  struct crosvm_vcpu_event event = wait_event(vcpu);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_PAUSED);
  SAME((uintptr_t)event.user, user);
  return event;
}

static struct crosvm *other;
static int stop;
static void *ask(void *unused) {
  (void)unused;
  for (uintptr_t n = 1; !__atomic_load_n(&stop, __ATOMIC_SEQ_CST); n++)
    OK(crosvm_pause_vcpus(other, 1, (void *)n));
  return NULL;
}

int main(void) {
  struct crosvm *vm = connect_vm();
  volatile uint8_t *memory = load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  /* Before the vCPU exists, and beyond the last: the last request counts. */
  OK(crosvm_pause_vcpus(vm, 1, (void *)1));
  OK(crosvm_pause_vcpus(vm, ~0ull, (void *)2));
  OK(crosvm_pause_vcpus(vm, 2, (void *)3));
  struct crosvm_vcpu *vcpu = boot(vm);
  OK(crosvm_vcpu_resume(vcpu));
  paused(vcpu, 2);
  struct kvm_regs regs;
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  /* While it is paused: it stops again, and the later one wins. */
  OK(crosvm_pause_vcpus(vm, 1, (void *)4));
  OK(crosvm_pause_vcpus(vm, 1, (void *)5));
  OK(crosvm_vcpu_resume(vcpu));
  paused(vcpu, 5);
  OK(crosvm_vcpu_resume(vcpu));
  /* While it runs; it goes on afterwards. */
  for (uintptr_t n = 10; n < 200; n++) {
    OK(crosvm_pause_vcpus(vm, 1, (void *)n));
    paused(vcpu, n);
    OK(crosvm_vcpu_resume(vcpu));
    if (n % 16 == 0) {
      uint32_t before = *(volatile uint32_t *)(memory + 0x4000);
      for (int i = 0; *(volatile uint32_t *)(memory + 0x4000) == before; i++) {
        CHECK(i < 10000);
        usleep(1000);
      }
    }
  }
  /* While it waits for the answer to a read: the access is over first. */
  memory[0x4005] = 1;
  struct crosvm_vcpu_event event = expect_access(vcpu, PORT, 0x80, false, 1);
  OK(crosvm_pause_vcpus(vm, 1, (void *)300));
  *event.io_access.data = 0x99;
  OK(crosvm_vcpu_resume(vcpu));
  paused(vcpu, 300);
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  SAME(regs.rax & 0xff, 0x99);
  OK(crosvm_vcpu_resume(vcpu));
  /* From another thread without end, while the vCPU leaves one pause for the next: what comes
   * is in order, and what was asked for last comes. */
  OK(crosvm_new_connection(vm, &other));
  pthread_t thread;
  CHECK(!pthread_create(&thread, NULL, ask, NULL));
  uintptr_t last = 0;
  for (int i = 0; i < 2000; i++) {
    event = wait_event(vcpu);
    SAME(event.kind, CROSVM_VCPU_EVENT_KIND_PAUSED);
    CHECK((uintptr_t)event.user > last);
    last = (uintptr_t)event.user;
    OK(crosvm_vcpu_resume(vcpu));
  }
  __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
  pthread_join(thread, NULL);
  OK(crosvm_pause_vcpus(vm, 1, (void *)~0ull));
  do {
    event = wait_event(vcpu);
    SAME(event.kind, CROSVM_VCPU_EVENT_KIND_PAUSED);
    OK(crosvm_vcpu_resume(vcpu));
  } while (event.user != (void *)~0ull);
  /* In hlt with interrupts off, from which nothing else would wake it. */
  memory[0x4004] = 1;
  usleep(20000);
  OK(crosvm_pause_vcpus(vm, 1, (void *)400));
  paused(vcpu, 400);
  OK(crosvm_vcpu_resume(vcpu));
  usleep(20000);
  OK(crosvm_pause_vcpus(vm, 1, (void *)401));
  paused(vcpu, 401);
  return 0;
}
