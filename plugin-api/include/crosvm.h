/*
 * The plugin interface of crosvm, version 0.22, as Cellblock offers it.
 *
 * A plugin is a program that the VMM starts, jailed, with the number of a socket in the
 * environment variable CROSVM_SOCKET. It makes the guest's memory, answers the guest's
 * accesses to ports and memory-mapped ranges, and has the state of every vCPU in its hands.
 * Link with -lcrosvm_plugin.
 *
 * Unless a function says otherwise it returns 0, or a file descriptor where its name says so,
 * or an error number, negated. A null pointer where something is needed is -EINVAL, a VMM
 * that is gone -EPIPE.
 *
 * A struct crosvm is for one thread at a time: a thread makes its own connection by
 * crosvm_new_connection. Different vCPUs may be driven by different threads at once.
 */
#ifndef CROSVM_H
#define CROSVM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/kvm.h>

#ifdef __cplusplus
extern "C" {
#define CROSVM_ASSERT(what) static_assert(what, #what)
#else
#define CROSVM_ASSERT(what) _Static_assert(what, #what)
#endif

#define CROSVM_API_MAJOR 0
#define CROSVM_API_MINOR 22
#define CROSVM_API_PATCH 0

/* A connection to the VMM. */
struct crosvm;
/* A virtual CPU. */
struct crosvm_vcpu;
/* An eventfd that guest accesses signal. */
struct crosvm_io;
/* Guest memory. */
struct crosvm_memory;
/* An eventfd that raises an interrupt, and one that tells of its end. */
struct crosvm_irq;

enum crosvm_address_space {
  CROSVM_ADDRESS_SPACE_IOPORT = 0,
  CROSVM_ADDRESS_SPACE_MMIO = 1,
};

/* ---- Connections ---------------------------------------------------------------------- */

/* Connects to the VMM that started this process. -ENOTCONN without CROSVM_SOCKET, -EINVAL
 * where it is no number. */
int crosvm_connect(struct crosvm **out);

/* A further connection, for another thread. It has the same objects and vCPUs. */
int crosvm_new_connection(struct crosvm *self, struct crosvm **out);

/* Closes a connection and sets the pointer to null. vCPUs are gone with the last one. */
int crosvm_destroy_connection(struct crosvm **self);

/* Returns an eventfd, a new one each time, that becomes readable when the VM ends. The plugin
 * has a second from then. It may write to it, to wake itself. */
int crosvm_get_shutdown_eventfd(struct crosvm *self);

/* Has been in the interface for a while: always -EINVAL. */
int crosvm_get_render_server_fd(void);

/* ---- The virtual machine -------------------------------------------------------------- */

/* Whether KVM answers exactly 1 for an extension. */
int crosvm_check_extension(struct crosvm *self, uint32_t extension, bool *has_extension);

/* -EINVAL: the VM has no capability that could be enabled. */
int crosvm_enable_capability(struct crosvm *self, uint32_t capability, uint32_t flags,
                             uint64_t args[4]);

/* What CPUID can say. With too small a buffer -E2BIG, and the count that is needed. */
int crosvm_get_supported_cpuid(struct crosvm *self, uint32_t count,
                               struct kvm_cpuid_entry2 *entries, uint32_t *out_count);
int crosvm_get_emulated_cpuid(struct crosvm *self, uint32_t count,
                              struct kvm_cpuid_entry2 *entries, uint32_t *out_count);

/* The MSRs that are a guest's state; buffers as above. */
int crosvm_get_msr_index_list(struct crosvm *self, uint32_t count, uint32_t *indices,
                              uint32_t *out_count);

struct crosvm_net_config {
  /* The TAP device; the caller closes it. */
  int tap_fd;
  /* IPv4, in network byte order. */
  uint32_t host_ip;
  uint32_t netmask;
  uint8_t host_mac_address[6];
  uint8_t _padding[2];
};
CROSVM_ASSERT(sizeof(struct crosvm_net_config) == 20);
CROSVM_ASSERT(offsetof(struct crosvm_net_config, tap_fd) == 0);
CROSVM_ASSERT(offsetof(struct crosvm_net_config, host_ip) == 4);
CROSVM_ASSERT(offsetof(struct crosvm_net_config, netmask) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_net_config, host_mac_address) == 12);

/* The VM's first TAP device; -ENODATA where it has none. */
int crosvm_net_get_config(struct crosvm *self, struct crosvm_net_config *config);

/* Has the guest's accesses to a range become events. An access belongs to the range it starts
 * in. Length 0 releases the range that starts there, -ENOENT where none does. -EPERM where it
 * overlaps another, -EINVAL for an unknown space or an end beyond the last address. */
int crosvm_reserve_range(struct crosvm *self, uint32_t space, uint64_t start, uint64_t length);

/* The same for writes that nobody waits for: the event has no_resume set. Reads give 0. */
int crosvm_reserve_async_write_range(struct crosvm *self, uint32_t space, uint64_t start,
                                     uint64_t length);

/* Sets the level of an interrupt line. */
int crosvm_set_irq(struct crosvm *self, uint32_t irq_id, bool active);

enum crosvm_irq_route_kind {
  CROSVM_IRQ_ROUTE_IRQCHIP = 0,
  CROSVM_IRQ_ROUTE_MSI = 1,
};

struct crosvm_irq_route {
  uint32_t irq_id;
  uint32_t kind;
  union {
    struct {
      uint32_t irqchip;
      uint32_t pin;
    } irqchip;
    struct {
      uint64_t address;
      uint32_t data;
      uint8_t _reserved[4];
    } msi;
  };
};
CROSVM_ASSERT(sizeof(struct crosvm_irq_route) == 24);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, irq_id) == 0);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, kind) == 4);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, irqchip.irqchip) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, irqchip.pin) == 12);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, msi.address) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_irq_route, msi.data) == 16);

/* Replaces the interrupt routing table; (0, null) clears it. -EINVAL for an unknown kind. */
int crosvm_set_irq_routing(struct crosvm *self, uint32_t count,
                           const struct crosvm_irq_route *routes);

#define CROSVM_MAX_HINT_COUNT 1
#define CROSVM_MAX_HINT_DETAIL_COUNT 32
#define CROSVM_HINT_ON_WRITE 0x1

struct crosvm_hint_detail {
  /* Which of the values below have to be the register's. */
  bool match_rax;
  bool match_rbx;
  bool match_rcx;
  bool match_rdx;
  uint8_t _reserved[4];
  uint64_t rax;
  uint64_t rbx;
  uint64_t rcx;
  uint64_t rdx;
  /* What is sent where they are. */
  bool send_sregs;
  bool send_debugregs;
  uint8_t _reserved2[6];
};
CROSVM_ASSERT(sizeof(struct crosvm_hint_detail) == 48);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, match_rax) == 0);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, match_rbx) == 1);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, match_rcx) == 2);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, match_rdx) == 3);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, rax) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, rbx) == 16);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, rcx) == 24);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, rdx) == 32);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, send_sregs) == 40);
CROSVM_ASSERT(offsetof(struct crosvm_hint_detail, send_debugregs) == 41);

struct crosvm_hint {
  /* 0. */
  uint32_t hint_version;
  /* 0. */
  uint32_t _reserved;
  uint32_t address_space;
  /* CROSVM_HINT_ON_WRITE for a write, 0 for a read. */
  uint16_t address_flags;
  uint16_t details_count;
  /* Not 0. */
  uint64_t address;
  union {
    struct crosvm_hint_detail *details;
    uint64_t _reserved3;
  };
};
CROSVM_ASSERT(sizeof(struct crosvm_hint) == 32);
CROSVM_ASSERT(offsetof(struct crosvm_hint, hint_version) == 0);
CROSVM_ASSERT(offsetof(struct crosvm_hint, _reserved) == 4);
CROSVM_ASSERT(offsetof(struct crosvm_hint, address_space) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_hint, address_flags) == 12);
CROSVM_ASSERT(offsetof(struct crosvm_hint, details_count) == 14);
CROSVM_ASSERT(offsetof(struct crosvm_hint, address) == 16);
CROSVM_ASSERT(offsetof(struct crosvm_hint, details) == 24);

/* With an access that matches, the general registers come along, and what the first detail
 * that matches says: getting them costs nothing then. Count 0 clears the hint. */
int crosvm_set_hypercall_hint(struct crosvm *self, uint32_t count,
                              const struct crosvm_hint *hints);

int crosvm_get_pic_state(struct crosvm *self, bool primary, struct kvm_pic_state *state);
int crosvm_set_pic_state(struct crosvm *self, bool primary, const struct kvm_pic_state *state);
int crosvm_get_ioapic_state(struct crosvm *self, struct kvm_ioapic_state *state);
int crosvm_set_ioapic_state(struct crosvm *self, const struct kvm_ioapic_state *state);
int crosvm_get_pit_state(struct crosvm *self, struct kvm_pit_state2 *state);
int crosvm_set_pit_state(struct crosvm *self, const struct kvm_pit_state2 *state);
int crosvm_get_clock(struct crosvm *self, struct kvm_clock_data *clock);
int crosvm_set_clock(struct crosvm *self, const struct kvm_clock_data *clock);

/* Where KVM keeps the page tables it needs for real mode on some processors. */
int crosvm_set_identity_map_addr(struct crosvm *self, uint32_t address);

/* Asks the vCPUs of the mask to stop with an event that has `user`. Returns at once; a request
 * that was not answered yet is replaced. */
int crosvm_pause_vcpus(struct crosvm *self, uint64_t vcpu_mask, void *user);

/* Makes the vCPUs; a second time -EINVAL. */
int crosvm_start(struct crosvm *self);

/* ---- Objects -------------------------------------------------------------------------- */

/* An eventfd that is signalled by guest writes of `length` bytes (0: any; 1, 2, 4, 8) at an
 * address, with `datamatch` only by that value. They are no events then. */
int crosvm_create_io_event(struct crosvm *self, uint32_t space, uint64_t address,
                           uint32_t length, const uint8_t *datamatch, struct crosvm_io **out);
/* -ENOENT for an object that does not exist. The pointer is set to null. */
int crosvm_destroy_io_event(struct crosvm *self, struct crosvm_io **io_event);
/* Belongs to the object. */
int crosvm_io_event_fd(struct crosvm_io *io_event);

/* Gives the guest memory: part of a memfd with F_SEAL_SHRINK. Into read-only memory the guest
 * writes by events of ranges. -EEXIST where there is memory already; the rest in the manual. */
int crosvm_create_memory(struct crosvm *self, int fd, uint64_t offset, uint64_t length,
                         uint64_t start, bool read_only, bool dirty_log,
                         struct crosvm_memory **out);
int crosvm_destroy_memory(struct crosvm *self, struct crosvm_memory **memory);
/* A bit for each page that was written since the last time; ceil(pages / 8) bytes. -ENOENT
 * without dirty_log. */
int crosvm_memory_get_dirty_log(struct crosvm *self, struct crosvm_memory *memory,
                                uint8_t *log);

int crosvm_create_irq_event(struct crosvm *self, uint32_t irq_id, struct crosvm_irq **out);
int crosvm_destroy_irq_event(struct crosvm *self, struct crosvm_irq **irq);
/* Both belong to the object. */
int crosvm_irq_event_get_fd(const struct crosvm_irq *irq);
int crosvm_irq_event_get_resample_fd(const struct crosvm_irq *irq);

/* ---- vCPUs ---------------------------------------------------------------------------- */

/* The same pointer for the same number on every connection. -ENOENT past the last. */
int crosvm_get_vcpu(struct crosvm *self, uint32_t cpu_id, struct crosvm_vcpu **out);

enum crosvm_vcpu_event_kind {
  /* The first of each vCPU. None runs before all were resumed from it. */
  CROSVM_VCPU_EVENT_KIND_INIT = 0,
  CROSVM_VCPU_EVENT_KIND_IO_ACCESS = 1,
  CROSVM_VCPU_EVENT_KIND_PAUSED = 2,
  CROSVM_VCPU_EVENT_KIND_HYPERV_HCALL = 3,
  CROSVM_VCPU_EVENT_KIND_HYPERV_SYNIC = 4,
};

struct crosvm_vcpu_event {
  uint32_t kind;
  uint8_t _padding[4];
  union {
    struct {
      uint32_t address_space;
      uint8_t _padding[4];
      uint64_t address;
      /* Valid until the resume. A read is answered by writing here. */
      uint8_t *data;
      uint32_t length;
      uint8_t is_write;
      /* The vCPU runs on; the next call is crosvm_vcpu_wait. */
      uint8_t no_resume;
    } io_access;
    /* What the request to pause gave. */
    void *user;
    struct {
      uint64_t input;
      /* Valid until the resume. */
      uint64_t *result;
      uint64_t params[2];
    } hyperv_call;
    struct {
      uint32_t msr;
      uint32_t _reserved;
      uint64_t control;
      uint64_t evt_page;
      uint64_t msg_page;
    } hyperv_synic;
    uint8_t _reserved[64];
  };
};
CROSVM_ASSERT(sizeof(struct crosvm_vcpu_event) == 72);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, kind) == 0);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.address_space) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.address) == 16);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.data) == 24);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.length) == 32);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.is_write) == 36);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, io_access.no_resume) == 37);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, user) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_call.input) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_call.result) == 16);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_call.params) == 24);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_synic.msr) == 8);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_synic.control) == 16);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_synic.evt_page) == 24);
CROSVM_ASSERT(offsetof(struct crosvm_vcpu_event, hyperv_synic.msg_page) == 32);

/* Waits for the next event. If KVM refused registers that were set before the last resume,
 * this call says so, and the event is for the next one. -EPROTO while the last event has not
 * been resumed. */
int crosvm_vcpu_wait(struct crosvm_vcpu *vcpu, struct crosvm_vcpu_event *event);

/* Lets the vCPU run on. -EPROTO without an event. So it is for everything below, which is
 * valid between wait and resume only. */
int crosvm_vcpu_resume(struct crosvm_vcpu *vcpu);

/* Set at the resume, together; a get after a set has what was set. */
int crosvm_vcpu_get_regs(struct crosvm_vcpu *vcpu, struct kvm_regs *regs);
int crosvm_vcpu_set_regs(struct crosvm_vcpu *vcpu, const struct kvm_regs *regs);
int crosvm_vcpu_get_sregs(struct crosvm_vcpu *vcpu, struct kvm_sregs *sregs);
int crosvm_vcpu_set_sregs(struct crosvm_vcpu *vcpu, const struct kvm_sregs *sregs);
int crosvm_vcpu_get_debugregs(struct crosvm_vcpu *vcpu, struct kvm_debugregs *debugregs);
int crosvm_vcpu_set_debugregs(struct crosvm_vcpu *vcpu, const struct kvm_debugregs *debugregs);

/* Set at once. */
int crosvm_vcpu_get_fpu(struct crosvm_vcpu *vcpu, struct kvm_fpu *fpu);
int crosvm_vcpu_set_fpu(struct crosvm_vcpu *vcpu, const struct kvm_fpu *fpu);
int crosvm_vcpu_get_xcrs(struct crosvm_vcpu *vcpu, struct kvm_xcrs *xcrs);
int crosvm_vcpu_set_xcrs(struct crosvm_vcpu *vcpu, const struct kvm_xcrs *xcrs);
int crosvm_vcpu_get_lapic_state(struct crosvm_vcpu *vcpu, struct kvm_lapic_state *state);
int crosvm_vcpu_set_lapic_state(struct crosvm_vcpu *vcpu, const struct kvm_lapic_state *state);
int crosvm_vcpu_get_mp_state(struct crosvm_vcpu *vcpu, struct kvm_mp_state *state);
int crosvm_vcpu_set_mp_state(struct crosvm_vcpu *vcpu, const struct kvm_mp_state *state);
int crosvm_vcpu_get_vcpu_events(struct crosvm_vcpu *vcpu, struct kvm_vcpu_events *events);
int crosvm_vcpu_set_vcpu_events(struct crosvm_vcpu *vcpu,
                                const struct kvm_vcpu_events *events);

/* The MSRs whose numbers the entries have; how many of them KVM gave. */
int crosvm_vcpu_get_msrs(struct crosvm_vcpu *vcpu, uint32_t count,
                         struct kvm_msr_entry *entries, uint32_t *out_count);
int crosvm_vcpu_set_msrs(struct crosvm_vcpu *vcpu, uint32_t count,
                         const struct kvm_msr_entry *entries);

/* An entry's index counts only with KVM_CPUID_FLAG_SIGNIFCANT_INDEX. */
int crosvm_vcpu_set_cpuid(struct crosvm_vcpu *vcpu, uint32_t count,
                          const struct kvm_cpuid_entry2 *entries);

/* What CPUID can say of Hyper-V; buffers as for crosvm_get_supported_cpuid. */
int crosvm_get_hyperv_cpuid(struct crosvm_vcpu *vcpu, uint32_t count,
                            struct kvm_cpuid_entry2 *entries, uint32_t *out_count);

/* KVM_CAP_HYPERV_SYNIC or _SYNIC2, without flags and arguments; else -EINVAL. */
int crosvm_vcpu_enable_capability(struct crosvm_vcpu *vcpu, uint32_t capability,
                                  uint32_t flags, uint64_t args[4]);

#undef CROSVM_ASSERT
#ifdef __cplusplus
}
#endif

#endif
