/* The TAP device: `tap`, started with --host-ip 10.7.0.1 --netmask 255.255.255.0
 * --mac 02:00:00:00:00:07. */
#include "harness.h"

#include <arpa/inet.h>

int main(void) {
  struct crosvm *vm = connect_vm();
  struct crosvm_net_config net, again;
  OK(crosvm_net_get_config(vm, &net));
  SAME(net.host_ip, inet_addr("10.7.0.1"));
  SAME(net.netmask, inet_addr("255.255.255.0"));
  const uint8_t mac[6] = {2, 0, 0, 0, 0, 7};
  CHECK(!memcmp(net.host_mac_address, mac, 6));
  OK(crosvm_net_get_config(vm, &again));
  CHECK(again.tap_fd != net.tap_fd);
  /* Who has 10.7.0.1? The host answers. In front of each packet is virtio-net's header. */
  uint8_t ask[12 + 42] = {0}, got[2048];
  uint8_t *frame = ask + 12;
  memset(frame, 0xff, 6);
  memcpy(frame + 6, "\2\0\0\0\0\x63\x08\x06\0\1\x08\0\6\4\0\1", 16);
  memcpy(frame + 22, "\2\0\0\0\0\x63\x0a\7\0\2", 10);
  memcpy(frame + 38, "\x0a\7\0\1", 4);
  CHECK(write(net.tap_fd, ask, sizeof ask) == sizeof ask);
  for (int i = 0; i < 100; i++) {
    CHECK(readable(net.tap_fd, 5000));
    ssize_t len = read(net.tap_fd, got, sizeof got);
    CHECK(len > 12 + 14);
    if (len >= 12 + 42 && !memcmp(got + 12 + 12, "\x08\x06", 2) && got[12 + 21] == 2) {
      CHECK(!memcmp(got + 12 + 22, mac, 6));
      return 0;
    }
  }
  FAIL("no answer");
}
