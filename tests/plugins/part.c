/* Takes part in snapshots: port 0x500 gives back what was last written to it, which is this
 * plugin's state. With the argument "big" its state is as large as one can be. */
#include "harness.h"
#include <cellblock.h>

static struct {
  uint64_t writes;
  uint8_t last;
} state;
static _Atomic int resting;
static int big, started;

static int64_t save(void *user, uint8_t *buffer) {
  CHECK(user == &state && !resting);
  resting = 1;
  memcpy(buffer, &state, sizeof(state));
  if (!big) return sizeof(state);
  memset(buffer + sizeof(state), 0x5a, CELLBLOCK_STATE_MAX - sizeof(state));
  return CELLBLOCK_STATE_MAX;
}

static void thaw(void *user) {
  CHECK(user == &state && resting);
  resting = 0;
}

static int restore(void *user, const uint8_t *from, size_t length) {
  CHECK(user == &state);
  SAME(length, big ? (size_t)CELLBLOCK_STATE_MAX : sizeof(state));
  if (big) SAME(from[CELLBLOCK_STATE_MAX - 1], 0x5a);
  memcpy(&state, from, sizeof(state));
  /* Again at a reset: everybody is at rest. */
  SAME(resting, started);
  if (started) fprintf(stderr, "went back to %llu writes\n", (unsigned long long)state.writes);
  return 0;
}

int main(int argc, char **argv) {
  big = argc > 1 && !strcmp(argv[1], "big");
  struct crosvm *c;
  struct crosvm_vcpu *vcpu;
  struct cellblock_part part = {.save = save, .thaw = thaw, .restore = restore};
  OK(crosvm_connect(&c));
  OK(crosvm_reserve_range(c, PORT, 0x500, 1));
  struct cellblock_part none = {.thaw = thaw};
  ERR(cellblock_take_part(c, NULL, &none, &state), EINVAL);
  int restored = OK(cellblock_take_part(c, NULL, &part, &state));
  ERR(cellblock_take_part(c, NULL, &part, &state), EALREADY);
  if (restored)
    fprintf(stderr, "went on from %llu writes\n", (unsigned long long)state.writes);
  else
    fprintf(stderr, "began\n");
  started = 1;
  OK(crosvm_start(c));
  OK(crosvm_get_vcpu(c, 0, &vcpu));
  for (;;) {
    struct crosvm_vcpu_event event;
    if (crosvm_vcpu_wait(vcpu, &event) < 0) return 0;
    /* It may come before `thaw` is called, on another thread. */
    if (event.kind == CROSVM_VCPU_EVENT_KIND_IO_ACCESS) {
      if (event.io_access.is_write) {
        state.writes++;
        state.last = event.io_access.data[0];
      } else {
        event.io_access.data[0] = state.last;
      }
    }
    if (crosvm_vcpu_resume(vcpu) < 0) return 0;
  }
}
