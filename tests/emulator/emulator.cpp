// A CUDA device in host memory, for tests: PyTorch's CPU kernels behind CUDA tensors, with the rules of a real device.
//
// - Its memory can be touched inside kernels only: who reads or writes it from the host gets a segmentation fault.
// - Fresh memory holds NaN, and freed memory is gone. There is a limit, and beyond it PyTorch's own out-of-memory error.
// - Tensors of two devices in one operation are an error, but for numbers (tensors without dimensions) that are read.
// - A copy that need not wait (non_blocking, pinned) is done as late as may be: when the host waits, or, towards the
//   device, when the device next works. A host that does not wait reads NaN.
// - While a stream is captured, operations are taken down and not done, to wait is an error, and memory is that of a
//   pool: what is let go of in one capture is used again in the next one, as by PyTorch's own allocator.
// - A process that is forked from one that has asked for devices has none.
//
// Loaded before PyTorch, so that CUDA's entries in its registries are these.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "work.h"

namespace {

int index_of(std::optional<c10::Device> d) {
  int index = d && d->has_index() ? d->index() : current;
  TORCH_CHECK(index < devices, "CUDA error: invalid device ordinal ", index);
  return index;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  std::lock_guard lock(gate);
  Now now(index_of(device));
  return at::detail::empty_generic(size, &memory, cuda_keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  std::lock_guard lock(gate);
  Now now(index_of(device));
  return at::detail::empty_strided_generic(size, stride, &memory, cuda_keys, c10::dtype_or_default(dtype));
}

void resize_storage(const at::Tensor& t, int64_t bytes) {
  std::lock_guard lock(gate);
  Now now(index_of(t.device()));
  auto* storage = t.storage().unsafeGetStorageImpl();
  c10::DataPtr fresh = memory.allocate(bytes);
  size_t n = std::min<size_t>(bytes, storage->nbytes());
  if (n) memory.copy_data(fresh.get(), storage->data(), n);
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t need = (impl->storage_offset() + impl->numel()) * self.element_size();
  if (need > self.storage().nbytes()) resize_storage(self, need);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto plain = c10::contiguous_strides(size);
  impl->set_sizes_and_strides(size, stride.empty() ? c10::IntArrayRef(plain) : stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  int64_t n = source.nbytes() / self.element_size();
  return set_storage(self, std::move(source), 0, {n}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
}

TORCH_LIBRARY(emulator, m) { m.def("resize_storage(Tensor t, int bytes) -> ()", &resize_storage); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device d) const override {
    c10::Device old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, (c10::DeviceIndex)current}; }
  void setDevice(c10::Device d) const override { current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return (c10::DeviceIndex)devices; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = (void*)this;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait(); }
  void synchronizeEvent(void*) const override { wait(); }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {
struct EmulatorHooks final : CUDAHooksInterface {
  explicit EmulatorHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return (DeviceIndex)current; }
  DeviceIndex getCurrentDevice() const override { return (DeviceIndex)current; }
  DeviceIndex deviceCount() const override { return (DeviceIndex)devices; }
  int getNumGPUs() const override { return devices; }
  Device getDeviceFromPtr(void* where) const override {
    return {DeviceType::CUDA, (DeviceIndex)block_at(where).second.device};
  }
  bool isPinnedPtr(const void* where) const override { return is_pinned(where); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override { wait(); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatorHooks)
}  // namespace at

// ---- what torch.cuda asks for -------------------------------------------------------------------------------------

namespace {
thread_local std::string said;
const char* guarded(const Action& run) {  // nullptr, or what went wrong
  std::lock_guard lock(gate);
  try {
    run();
    return nullptr;
  } catch (const c10::Error& error) {
    said = error.what_without_backtrace();
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
}  // namespace

extern "C" {
void gpu_setup(int count, size_t bytes) {
  devices = count;
  for (auto& own : stats) own.limit = bytes;
}
void gpu_touch() { touched = true; }
int64_t gpu_asked() { return asked; }
int gpu_current() { return current; }
void gpu_use(int device) { current = device; }
size_t gpu_allocated(int device) { return stats[device].allocated; }
size_t gpu_peak(int device) { return stats[device].peak; }
void gpu_new_peak(int device) { stats[device].peak = stats[device].allocated; }
void gpu_limit(int device, size_t bytes) { stats[device].limit = bytes; }
void gpu_tell_of_waits(int on) { tell_of_waits = on; }
const char* gpu_wait() { return guarded([] { wait(); }); }
void* gpu_begin(int64_t pool) {
  begin(pool);
  return begun;
}
void gpu_end() { begun = nullptr; }
void gpu_aside() { aside = true; }
const char* gpu_replay(void* graph) {
  return guarded([graph] {
    work();
    ++asked;
    for (auto& action : ((Capture*)graph)->actions) action();
  });
}
void gpu_forget(void* graph) {
  std::lock_guard lock(gate);
  forget((Capture*)graph);
}
}
