/* Sizes, offsets and numbers that programs built against the old header rely on, written
 * down here a second time. Compiling this is the test. */
#include <crosvm.h>

#define SIZE(type, size) _Static_assert(sizeof(type) == size, #type)
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == offset, #type "." #field)
#define SPAN(type, field, offset, size) \
  AT(type, field, offset);              \
  _Static_assert(sizeof(((type *)0)->field) == size, #type "." #field)
#define IS(name, value) _Static_assert((name) == (value), #name)

SIZE(struct crosvm_net_config, 20);
SPAN(struct crosvm_net_config, tap_fd, 0, 4);
SPAN(struct crosvm_net_config, host_ip, 4, 4);
SPAN(struct crosvm_net_config, netmask, 8, 4);
SPAN(struct crosvm_net_config, host_mac_address, 12, 6);

SIZE(struct crosvm_irq_route, 24);
SPAN(struct crosvm_irq_route, irq_id, 0, 4);
SPAN(struct crosvm_irq_route, kind, 4, 4);
SPAN(struct crosvm_irq_route, irqchip.irqchip, 8, 4);
SPAN(struct crosvm_irq_route, irqchip.pin, 12, 4);
SPAN(struct crosvm_irq_route, msi.address, 8, 8);
SPAN(struct crosvm_irq_route, msi.data, 16, 4);

SIZE(struct crosvm_hint_detail, 48);
SPAN(struct crosvm_hint_detail, match_rax, 0, 1);
SPAN(struct crosvm_hint_detail, match_rbx, 1, 1);
SPAN(struct crosvm_hint_detail, match_rcx, 2, 1);
SPAN(struct crosvm_hint_detail, match_rdx, 3, 1);
SPAN(struct crosvm_hint_detail, rax, 8, 8);
SPAN(struct crosvm_hint_detail, rbx, 16, 8);
SPAN(struct crosvm_hint_detail, rcx, 24, 8);
SPAN(struct crosvm_hint_detail, rdx, 32, 8);
SPAN(struct crosvm_hint_detail, send_sregs, 40, 1);
SPAN(struct crosvm_hint_detail, send_debugregs, 41, 1);

SIZE(struct crosvm_hint, 32);
SPAN(struct crosvm_hint, hint_version, 0, 4);
SPAN(struct crosvm_hint, _reserved, 4, 4);
SPAN(struct crosvm_hint, address_space, 8, 4);
SPAN(struct crosvm_hint, address_flags, 12, 2);
SPAN(struct crosvm_hint, details_count, 14, 2);
SPAN(struct crosvm_hint, address, 16, 8);
SPAN(struct crosvm_hint, details, 24, 8);

SIZE(struct crosvm_vcpu_event, 72);
SPAN(struct crosvm_vcpu_event, kind, 0, 4);
SPAN(struct crosvm_vcpu_event, io_access.address_space, 8, 4);
SPAN(struct crosvm_vcpu_event, io_access.address, 16, 8);
SPAN(struct crosvm_vcpu_event, io_access.data, 24, 8);
SPAN(struct crosvm_vcpu_event, io_access.length, 32, 4);
SPAN(struct crosvm_vcpu_event, io_access.is_write, 36, 1);
SPAN(struct crosvm_vcpu_event, io_access.no_resume, 37, 1);
SPAN(struct crosvm_vcpu_event, user, 8, 8);
SPAN(struct crosvm_vcpu_event, hyperv_call.input, 8, 8);
SPAN(struct crosvm_vcpu_event, hyperv_call.result, 16, 8);
SPAN(struct crosvm_vcpu_event, hyperv_call.params, 24, 16);
SPAN(struct crosvm_vcpu_event, hyperv_synic.msr, 8, 4);
SPAN(struct crosvm_vcpu_event, hyperv_synic.control, 16, 8);
SPAN(struct crosvm_vcpu_event, hyperv_synic.evt_page, 24, 8);
SPAN(struct crosvm_vcpu_event, hyperv_synic.msg_page, 32, 8);

IS(CROSVM_API_MAJOR, 0);
IS(CROSVM_API_MINOR, 22);
IS(CROSVM_API_PATCH, 0);
IS(CROSVM_ADDRESS_SPACE_IOPORT, 0);
IS(CROSVM_ADDRESS_SPACE_MMIO, 1);
IS(CROSVM_IRQ_ROUTE_IRQCHIP, 0);
IS(CROSVM_IRQ_ROUTE_MSI, 1);
IS(CROSVM_VCPU_EVENT_KIND_INIT, 0);
IS(CROSVM_VCPU_EVENT_KIND_IO_ACCESS, 1);
IS(CROSVM_VCPU_EVENT_KIND_PAUSED, 2);
IS(CROSVM_VCPU_EVENT_KIND_HYPERV_HCALL, 3);
IS(CROSVM_VCPU_EVENT_KIND_HYPERV_SYNIC, 4);
IS(CROSVM_MAX_HINT_COUNT, 1);
IS(CROSVM_MAX_HINT_DETAIL_COUNT, 32);
IS(CROSVM_HINT_ON_WRITE, 1);

int main(void) { return 0; }
