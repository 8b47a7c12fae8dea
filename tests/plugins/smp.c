/* More than one vCPU (`smp COUNT`), each driven by a thread of its own with a connection of
 * its own. None runs before all were resumed from INIT. */
#include "harness.h"

GUEST(guest, "out %al, $0x80\n in $0x80, %al\n out %al, $0x80\n hlt");

static struct crosvm *vm;
static uint32_t count;
static uint32_t resumed;
static struct crosvm_vcpu *of_main[64];

static void *drive(void *argument) {
  uint32_t id = (uintptr_t)argument;
  struct crosvm *own;
  /* A connection is for one thread at a time. */
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&lock);
  OK(crosvm_new_connection(vm, &own));
  pthread_mutex_unlock(&lock);
  struct crosvm_vcpu *vcpu = vcpu_of(own, id);
  CHECK(vcpu == of_main[id]);
  SAME(wait_event(vcpu).kind, CROSVM_VCPU_EVENT_KIND_INIT);
  begin_at(vcpu, CODE);
  struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
  OK(crosvm_vcpu_set_mp_state(vcpu, &runnable));
  struct kvm_regs regs;
  OK(crosvm_vcpu_get_regs(vcpu, &regs));
  regs.rax = id;
  OK(crosvm_vcpu_set_regs(vcpu, &regs));
  if (id == 0) usleep(50000); /* the others have to wait for the last */
  __atomic_add_fetch(&resumed, 1, __ATOMIC_SEQ_CST);
  OK(crosvm_vcpu_resume(vcpu));
  struct crosvm_vcpu_event event = expect_access(vcpu, PORT, 0x80, true, 1);
  SAME(__atomic_load_n(&resumed, __ATOMIC_SEQ_CST), count);
  SAME(number(event), id);
  OK(crosvm_vcpu_resume(vcpu));
  answer_read(vcpu, PORT, 0x80, 1, id ^ 0xff);
  expect_access(vcpu, PORT, 0x80, true, 1);
  OK(crosvm_destroy_connection(&own));
  CHECK(!own);
  return NULL;
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  count = atoi(argv[1]);
  vm = connect_vm();
  load(vm, guest, guest_end);
  OK(crosvm_reserve_range(vm, PORT, 0x80, 1));
  for (uint32_t id = 0; id < count; id++) of_main[id] = vcpu_of(vm, id);
  struct crosvm_vcpu *past;
  ERR(crosvm_get_vcpu(vm, count, &past), ENOENT);
  OK(crosvm_start(vm));
  pthread_t threads[64];
  for (uintptr_t id = 0; id < count; id++)
    CHECK(!pthread_create(&threads[id], NULL, drive, (void *)id));
  for (uint32_t id = 0; id < count; id++) pthread_join(threads[id], NULL);
  return 0;
}
