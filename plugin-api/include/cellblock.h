/* What Cellblock has beyond crosvm.h: a plugin's part in snapshots.
 *
 * A plugin that does not take part is at rest when its vCPUs have stopped and it has answered
 * every event. A snapshot with it is for inspection: the VM cannot be restored from it, since
 * what the plugin knows is not in it.
 */
#ifndef CELLBLOCK_H
#define CELLBLOCK_H

#include <crosvm.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The most bytes of a plugin's state. */
#define CELLBLOCK_STATE_MAX (1 << 20)

struct cellblock_part {
  /* Come to rest, and write all that is needed to go on from here to `buffer`, which has room
   * for CELLBLOCK_STATE_MAX bytes. Returns how many those are, or an error number, negated: the
   * snapshot fails then. No vCPU runs, and none will before the snapshot is taken: guest memory
   * and the plugin's state must not change until `thaw` or the next event, whichever is first.
   * The whole VM waits for this. Called on a thread of the library's, never while `thaw` is. */
  int64_t (*save)(void *user, uint8_t *buffer);
  /* Go on. It follows every call of `save`, on the same thread. May be null. */
  void (*thaw)(void *user);
  /* Go on from what `save` gave, in a VM that was restored. Called by cellblock_take_part, on the
   * caller's thread. Returns 0, or an error number, negated, which that returns.
   * It is called again when such a VM is reset in place, with the same state: between `save`,
   * whose state is not kept then, and `thaw`, on their thread. An error ends the VM. */
  int (*restore)(void *user, const uint8_t *state, size_t length);
};

/* Takes part in snapshots from now on, once for all connections of a plugin. To be called before
 * crosvm_start: in a VM that was restored, vCPUs have the state of the snapshot at their first
 * event, and it is for the plugin not to set it anew. `name` tells attached programs apart, and
 * may be null in a plugin that the VMM started.
 * Returns 0 in a VM that was started, 1 in one that was restored, or an error number, negated:
 * -EINVAL without `save` or `restore`, -EALREADY where it takes part already. */
int cellblock_take_part(struct crosvm *, const char *name, const struct cellblock_part *,
                        void *user);

#ifdef __cplusplus
}
#endif

#endif
