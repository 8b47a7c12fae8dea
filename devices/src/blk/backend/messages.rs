//! The vhost-user messages, each handed to what it means for the device.

use std::fs::File;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::{Addresses, Backend, internal, non_blocking};

/// The answer to messages that belong to features that are not offered.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("this message was not offered"))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        let result = self.reset();
        self.acknowledge(result)
    }

    fn reset_device(&mut self) -> Result<()> {
        let result = self.reset();
        self.acknowledge(result)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let result = self.try_set_features(features);
        self.acknowledge(result)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?;
        let result = match VhostUserProtocolFeatures::from_bits(features) {
            Some(features) if offered.contains(features) => {
                self.protocol = features;
                Ok(())
            }
            _ => Err(Error::InvalidOperation("a protocol feature was not offered")),
        };
        self.acknowledge(result)
    }

    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let result = self.try_set_mem_table(ctx, files);
        self.acknowledge(result).map(|()| None)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let result = self.try_set_vring_num(index, num);
        self.acknowledge(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses { descriptors: descriptor, avail: available, used };
        let result = self.try_set_vring_addr(index, flags, addresses);
        self.acknowledge(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let result = self.try_set_vring_base(index, base);
        self.acknowledge(result)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let at = self.index(index)?;
        self.pause(at)?;
        self.vrings[at].forget();
        Ok(VhostUserVringState::new(index, self.vrings[at].next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = self.try_set_vring_kick(index, fd);
        self.acknowledge(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = non_blocking(fd).and_then(|fd| self.replace(index, |vring| vring.call = fd));
        self.acknowledge(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let result = non_blocking(fd).and_then(|fd| self.replace(index, |vring| vring.err = fd));
        self.acknowledge(result)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let result = self.try_set_vring_enable(index, enable);
        self.acknowledge(result)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The size was checked against the message, so it is small.
        let at = |i: u32| self.config.get(offset.saturating_add(i) as usize);
        Ok((0..size).map(|i| at(i).copied().unwrap_or(0)).collect())
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let result = self.try_set_config(offset, buf);
        self.acknowledge(result)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    /// Not while a ring runs under the record: there is only one.
    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        if self.any_running() || usize::from(asked.num_queues) > self.vrings.len() {
            return Err(Error::InvalidOperation("no record of this shape now"));
        }
        self.records = None;
        self.offer.give(asked).map_err(internal)
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        let result = self.try_set_inflight(told, &file);
        self.acknowledge(result)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        self.transfer(direction, fd).map(|()| None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.check_transfer()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}
