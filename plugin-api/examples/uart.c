/* A serial console as a plugin: a 16550 at port 0x3f8, interrupt 4, on standard input and
 * output. The guest is a flat real-mode image, loaded and entered at 0x1000, or, without
 * one, a few lines of assembly that greet and repeat what is typed until ctrl-d.
 *
 *   cc uart.c -o uart -pthread -I../include -L../../target/release -lcrosvm_plugin
 *   cellblock run --plugin uart -p uart
 *   cellblock run --plugin uart --plugin-mount /tmp/image -p uart -p /tmp/image
 */
#define _GNU_SOURCE
#include <crosvm.h>

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BASE = 0x3f8, IRQ = 4, RESET = 0x64, START = 0x1000, MEMORY = 1 << 20 };
enum { DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCRATCH };
enum { LSR_DATA = 0x01, LSR_EMPTY = 0x60, LCR_DLAB = 0x80, MCR_LOOP = 0x10 };

#define OK(call)                                                       \
  ({                                                                   \
    int result_ = (call);                                              \
    if (result_ < 0) {                                                 \
      fprintf(stderr, "%s: %s\n", #call, strerror(-result_));          \
      exit(1);                                                         \
    }                                                                  \
    result_;                                                           \
  })

/* The guest where none is given. Ctrl-d resets the machine, which is its end. */
extern const uint8_t guest[], guest_end[];
asm(".pushsection .rodata\n.code16\nguest:\n"
    "mov $(0x1000 + greeting - guest), %si\n"
    "1: lodsb\n test %al, %al\n jz 2f\n call put\n jmp 1b\n"
    "2: mov $0x3fd, %dx\n in %dx, %al\n test $1, %al\n jz 2b\n mov $0x3f8, %dx\n in %dx, %al\n"
    "cmp $4, %al\n je 3f\n call put\n cmp $13, %al\n jne 2b\n mov $10, %al\n call put\n jmp 2b\n"
    "3: mov $0xfe, %al\n out %al, $0x64\n hlt\n"
    "put: push %ax\n 4: mov $0x3fd, %dx\n in %dx, %al\n test $0x20, %al\n jz 4b\n"
    "pop %ax\n mov $0x3f8, %dx\n out %al, %dx\n ret\n"
    "greeting: .asciz \"A serial console by a plugin. Type; ctrl-d ends.\\r\\n\"\n"
    "guest_end:\n.code64\n.popsection");

/* The device. The lock is held by the vCPU's thread for an access, and by the reader for a
 * byte; each has a connection of its own. */
static struct {
  pthread_mutex_t lock;
  pthread_cond_t room;
  uint8_t ier, lcr, mcr, scratch, divisor[2];
  uint8_t input[64];
  unsigned head, count;
  bool said_empty, line; /* the transmitter's interrupt is pending; the line's level */
} uart = {.lock = PTHREAD_MUTEX_INITIALIZER, .room = PTHREAD_COND_INITIALIZER,
          .divisor = {1, 0}};

/* What IIR says: the highest interrupt that is pending, 1 for none. */
static uint8_t pending(void) {
  if ((uart.ier & 1) && uart.count) return 4;
  if ((uart.ier & 2) && uart.said_empty) return 2;
  return 1;
}

static void update_line(struct crosvm *vm) {
  bool level = pending() != 1;
  if (level != uart.line) OK(crosvm_set_irq(vm, IRQ, level));
  uart.line = level;
}

static void receive(uint8_t byte) {
  uart.input[(uart.head + uart.count++) % sizeof uart.input] = byte;
}

static uint8_t read_register(unsigned n) {
  switch (n) {
    case DATA:
      if (uart.lcr & LCR_DLAB) return uart.divisor[0];
      if (!uart.count) return 0;
      uint8_t byte = uart.input[uart.head];
      uart.head = (uart.head + 1) % sizeof uart.input;
      uart.count--;
      pthread_cond_signal(&uart.room);
      return byte;
    case IER: return uart.lcr & LCR_DLAB ? uart.divisor[1] : uart.ier;
    case IIR_FCR: {
      uint8_t value = pending();
      if (value == 2) uart.said_empty = false; /* read, so it is told */
      return value | 0xc0;
    }
    case LCR: return uart.lcr;
    case MCR: return uart.mcr;
    case LSR: return LSR_EMPTY | (uart.count ? LSR_DATA : 0);
    case MSR: /* looped back: what we say is what we hear */
      if (uart.mcr & MCR_LOOP)
        return (uart.mcr & 1) << 5 | (uart.mcr & 2) << 3 | (uart.mcr & 4) << 4 | (uart.mcr & 8) << 4;
      return 0xb0;
    default: return uart.scratch;
  }
}

static void write_register(unsigned n, uint8_t value) {
  switch (n) {
    case DATA:
      if (uart.lcr & LCR_DLAB) {
        uart.divisor[0] = value;
      } else if (uart.mcr & MCR_LOOP) {
        if (uart.count < sizeof uart.input) receive(value);
      } else if (write(STDOUT_FILENO, &value, 1) != 1) {
        exit(1);
      }
      uart.said_empty = true;
      break;
    case IER:
      if (uart.lcr & LCR_DLAB) {
        uart.divisor[1] = value;
      } else {
        uart.said_empty |= !(uart.ier & 2) && (value & 2);
        uart.ier = value & 0xf;
      }
      break;
    case IIR_FCR:
      if (value & 2) uart.count = 0;
      break;
    case LCR: uart.lcr = value; break;
    case MCR: uart.mcr = value & 0x1f; break;
    case SCRATCH: uart.scratch = value;
  }
}

/* Bytes from standard input, as fast as the guest takes them. */
static void *reader(void *connection) {
  uint8_t byte;
  while (read(STDIN_FILENO, &byte, 1) == 1) {
    pthread_mutex_lock(&uart.lock);
    while (uart.count == sizeof uart.input) pthread_cond_wait(&uart.room, &uart.lock);
    receive(byte);
    update_line(connection);
    pthread_mutex_unlock(&uart.lock);
  }
  return NULL;
}

static void make_memory(struct crosvm *vm, const char *image) {
  struct crosvm_memory *memory;
  int fd = memfd_create("guest", MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, MEMORY) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)) exit(1);
  uint8_t *here = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (here == MAP_FAILED) exit(1);
  memcpy(here + START, guest, guest_end - guest);
  FILE *file = image ? fopen(image, "r") : NULL;
  if (image && (!file || !fread(here + START, 1, MEMORY - START, file))) {
    perror(image);
    exit(1);
  }
  OK(crosvm_create_memory(vm, fd, 0, MEMORY, 0, false, false, &memory));
}

int main(int argc, char **argv) {
  struct crosvm *vm, *of_reader;
  struct crosvm_vcpu *vcpu;
  struct crosvm_vcpu_event event;
  struct kvm_sregs sregs;
  struct kvm_regs regs = {.rip = START, .rflags = 2, .rsp = START};
  pthread_t thread;
  OK(crosvm_connect(&vm));
  OK(crosvm_new_connection(vm, &of_reader));
  make_memory(vm, argc > 1 ? argv[1] : NULL);
  OK(crosvm_reserve_range(vm, CROSVM_ADDRESS_SPACE_IOPORT, BASE, 8));
  OK(crosvm_reserve_range(vm, CROSVM_ADDRESS_SPACE_IOPORT, RESET, 1));
  OK(crosvm_start(vm));
  OK(crosvm_get_vcpu(vm, 0, &vcpu));
  if (pthread_create(&thread, NULL, reader, of_reader)) return 1;
  for (;;) {
    OK(crosvm_vcpu_wait(vcpu, &event));
    if (event.kind == CROSVM_VCPU_EVENT_KIND_INIT) {
      OK(crosvm_vcpu_get_sregs(vcpu, &sregs));
      sregs.cs.base = sregs.cs.selector = 0;
      OK(crosvm_vcpu_set_sregs(vcpu, &sregs));
      OK(crosvm_vcpu_set_regs(vcpu, &regs));
    } else if (event.kind == CROSVM_VCPU_EVENT_KIND_IO_ACCESS) {
      bool is_write = event.io_access.is_write, is_reset = event.io_access.address == RESET;
      if (is_reset && is_write) return 0;
      pthread_mutex_lock(&uart.lock);
      for (unsigned i = 0; i < event.io_access.length; i++) {
        /* The bytes of a string go to one port; an event does not tell them from a word's. */
        bool string = event.io_access.length > 4 || event.io_access.address == BASE;
        unsigned n = event.io_access.address - BASE + (string && !(uart.lcr & LCR_DLAB) ? 0 : i);
        if (is_write) write_register(n % 8, event.io_access.data[i]);
        else event.io_access.data[i] = is_reset ? 0 : read_register(n % 8);
      }
      update_line(vm);
      pthread_mutex_unlock(&uart.lock);
    }
    OK(crosvm_vcpu_resume(vcpu));
  }
}
