/* What the test plugins share. A plugin of these exits 0 when all it checked holds; otherwise
 * it says on standard error what does not, and exits 1. Guest code is real mode, assembled
 * with the plugin: GUEST(name, "..."). */
#ifndef HARNESS_H
#define HARNESS_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <crosvm.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PORT CROSVM_ADDRESS_SPACE_IOPORT
#define MMIO CROSVM_ADDRESS_SPACE_MMIO

/* _exit: a thread that waits for its vCPU must not hold the end up. */
#define FAIL(...)                                        \
  do {                                                   \
    fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);      \
    fprintf(stderr, __VA_ARGS__);                        \
    fprintf(stderr, "\n");                               \
    fflush(stderr);                                      \
    _exit(1);                                            \
  } while (0)
#define CHECK(what) \
  if (!(what)) FAIL("%s", #what)
/* A call that has to work; its value. */
#define OK(call) ok(call, __FILE__, __LINE__, #call)
/* A call that has to fail with this error. */
#define ERR(call, number)                                                              \
  do {                                                                                 \
    int got_ = (call);                                                                 \
    if (got_ != -(number))                                                             \
      FAIL("%s is %d (%s) instead of -%s", #call, got_, strerror(-got_), #number);      \
  } while (0)
#define SAME(a, b)                                                                       \
  do {                                                                                   \
    unsigned long long a_ = (a), b_ = (b);                                               \
    if (a_ != b_) FAIL("%s is %#llx, %s is %#llx", #a, a_, #b, b_);                      \
  } while (0)
/* `code` as 16-bit machine code: name and name##_end. */
#define GUEST(name, code)                                                             \
  extern const uint8_t name[], name##_end[];                                          \
  asm(".pushsection .rodata\n.code16\n" #name ":\n" code "\n" #name "_end:\n.code64\n" \
      ".popsection\n")

static inline int ok(int value, const char *file, int line, const char *what) {
  if (value < 0) {
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, strerror(-value));
    fflush(stderr);
    _exit(1);
  }
  return value;
}

/* A memfd as guest memory has to be. */
static inline int memory_fd(uint64_t size) {
  int fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(fd >= 0 && !ftruncate(fd, size) && !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
  return fd;
}

static inline uint8_t *map(int fd, uint64_t size) {
  void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(memory != MAP_FAILED);
  return memory;
}

/* Guest memory from `start` on, mapped here as well. */
static inline uint8_t *give_memory(struct crosvm *vm, uint64_t start, uint64_t size) {
  struct crosvm_memory *memory;
  int fd = memory_fd(size);
  OK(crosvm_create_memory(vm, fd, 0, size, start, false, false, &memory));
  uint8_t *here = map(fd, size);
  close(fd);
  return here;
}

static inline struct crosvm *connect_vm(void) {
  struct crosvm *vm;
  OK(crosvm_connect(&vm));
  return vm;
}

static inline struct crosvm_vcpu *vcpu_of(struct crosvm *vm, uint32_t id) {
  struct crosvm_vcpu *vcpu;
  OK(crosvm_get_vcpu(vm, id, &vcpu));
  return vcpu;
}

static inline struct crosvm_vcpu_event wait_event(struct crosvm_vcpu *vcpu) {
  struct crosvm_vcpu_event event;
  OK(crosvm_vcpu_wait(vcpu, &event));
  return event;
}

/* Has a vCPU that is stopped begin in real mode at `ip`, data and stack segment 0. */
static inline void begin_at(struct crosvm_vcpu *vcpu, uint64_t ip) {
  struct kvm_sregs sregs;
  OK(crosvm_vcpu_get_sregs(vcpu, &sregs));
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  OK(crosvm_vcpu_set_sregs(vcpu, &sregs));
  struct kvm_regs regs = {.rip = ip, .rflags = 2, .rsp = 0x8000};
  OK(crosvm_vcpu_set_regs(vcpu, &regs));
}

#define CODE 0x1000

/* A machine with a vCPU and a MiB of memory that runs `code` from its INIT event on; that
 * still has to be resumed. */
static inline uint8_t *load(struct crosvm *vm, const uint8_t *code, const uint8_t *end) {
  uint8_t *memory = give_memory(vm, 0, 1 << 20);
  memcpy(memory + CODE, code, end - code);
  return memory;
}

static inline struct crosvm_vcpu *boot(struct crosvm *vm) {
  OK(crosvm_start(vm));
  struct crosvm_vcpu *vcpu = vcpu_of(vm, 0);
  SAME(wait_event(vcpu).kind, CROSVM_VCPU_EVENT_KIND_INIT);
  begin_at(vcpu, CODE);
  return vcpu;
}

/* The next event, which has to be this access. Its data is the event's. */
static inline struct crosvm_vcpu_event expect_access(struct crosvm_vcpu *vcpu, uint32_t space,
                                                     uint64_t address, bool is_write,
                                                     uint32_t length) {
  struct crosvm_vcpu_event event = wait_event(vcpu);
  SAME(event.kind, CROSVM_VCPU_EVENT_KIND_IO_ACCESS);
  SAME(event.io_access.address_space, space);
  SAME(event.io_access.address, address);
  SAME(event.io_access.is_write, is_write);
  SAME(event.io_access.length, length);
  return event;
}

static inline uint64_t number(struct crosvm_vcpu_event event) {
  uint64_t value = 0;
  memcpy(&value, event.io_access.data, event.io_access.length < 8 ? event.io_access.length : 8);
  return value;
}

/* A write of this value. */
static inline void expect_write(struct crosvm_vcpu *vcpu, uint32_t space, uint64_t address,
                                uint32_t length, uint64_t value) {
  struct crosvm_vcpu_event event = expect_access(vcpu, space, address, true, length);
  SAME(number(event), value);
  SAME(event.io_access.no_resume, 0);
  OK(crosvm_vcpu_resume(vcpu));
}

/* A read, which gets this value. */
static inline void answer_read(struct crosvm_vcpu *vcpu, uint32_t space, uint64_t address,
                               uint32_t length, uint64_t value) {
  struct crosvm_vcpu_event event = expect_access(vcpu, space, address, false, length);
  memcpy(event.io_access.data, &value, length);
  OK(crosvm_vcpu_resume(vcpu));
}

static inline bool readable(int fd, int milliseconds) {
  struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
  return poll(&poll_fd, 1, milliseconds) == 1;
}

/* To the test that started us, and back. */
static inline void tell(const char *line) {
  printf("%s\n", line);
  fflush(stdout);
}
static inline void hear(const char *line) {
  char got[64];
  CHECK(fgets(got, sizeof got, stdin));
  got[strcspn(got, "\n")] = 0;
  if (strcmp(got, line)) FAIL("heard %s instead of %s", got, line);
}
#endif
