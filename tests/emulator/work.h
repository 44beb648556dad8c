#pragma once
// Operations, copies and captures: what the emulated devices do, and when.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>

#include <deque>
#include <functional>

#include "memory.h"

namespace {

const c10::DispatchKeySet cuda_keys(c10::DispatchKey::CUDA);

// The same memory as a tensor of the CPU. It does not own it: a recording knows addresses only.
at::Tensor as_host(const at::Tensor& t) {
  auto* impl = t.unsafeGetTensorImpl();
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                       c10::DataPtr(t.storage().mutable_data(), c10::Device(c10::DeviceType::CPU)),
                       c10::GetAllocator(c10::DeviceType::CPU), /*resizable=*/true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  if (t.is_conj()) made._set_conj(true);
  if (t.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor on_storage(c10::Storage storage, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), cuda_keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A result of a CPU kernel, brought to the device.
at::Tensor brought(const at::Tensor& t, int device) {
  Now now(device);
  size_t n = t.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), n, memory.allocate(n), &memory, /*resizable=*/true);
  auto made = on_storage(storage, t);
  if (n) {
    Opened opened;
    opened.open(storage.mutable_data());
    std::memcpy(storage.mutable_data(), t.storage().data(), n);
  }
  return made;
}

using Action = std::function<void()>;
struct Capture {
  int64_t pool;
  std::vector<Action> actions;
};
Capture* begun = nullptr;
std::map<int64_t, int> captures;  // of each pool
Capture* capturing() { return aside ? nullptr : begun; }
int64_t pool_of_capture() { return capturing() ? capturing()->pool : -1; }

void begin(int64_t pool) {
  begun = new Capture{pool, {}};
  ++captures[pool];
}

void forget(Capture* capture) {
  if (--captures[capture->pool] == 0) release_pool(capture->pool);
  delete capture;
}

std::deque<Action> to_device, to_host;  // copies that nobody has waited for
bool tell_of_waits = false;
int64_t asked = 0;  // how often the host has asked for something that the device itself has to do

void work() {
  for (; !to_device.empty(); to_device.pop_front()) to_device.front()();
}

void wait(bool told = true) {
  TORCH_CHECK(!capturing(), "CUDA error: operation not permitted when stream is capturing");
  if (told && tell_of_waits && !aside) TORCH_WARN("called a synchronizing CUDA operation");
  work();
  for (; !to_host.empty(); to_host.pop_front()) to_host.front()();
}

// Tensors of a list of arguments, replaced in place.
template <class F>
void each_tensor(c10::IValue& value, const F& f) {
  if (value.isTensor()) {
    value = f(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& t : value.toTensorVector()) made.push_back(f(t));
    value = made;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (std::optional<at::Tensor> t : value.toOptionalTensorList())
      made.push_back(t ? std::optional<at::Tensor>(f(*t)) : t);
    value = made;
  }
}

bool on_gpu(const at::Tensor& t) { return t.defined() && t.is_cuda(); }

struct Pair {
  at::Tensor gpu, host;  // a tensor of the device and its alias
  bool written;
};

// The arguments of one operation, with aliases in the place of the device's tensors.
struct Call {
  std::vector<c10::IValue> stack;
  std::vector<Pair> pairs;
  int device = -1;

  Call(const c10::OperatorHandle& op, std::vector<c10::IValue> args) : stack(std::move(args)) {
    const auto& named = op.schema().arguments();
    for (size_t i = 0; i < stack.size(); ++i) {
      bool write = named[i].alias_info() && named[i].alias_info()->isWrite();
      bool anywhere = stack[i].isOptionalTensorList();  // indices
      if (stack[i].isDevice()) {
        at(stack[i].toDevice());
        stack[i] = c10::Device(c10::DeviceType::CPU);
      }
      each_tensor(stack[i], [&](const at::Tensor& t) { return on_gpu(t) ? taken(t, write) : t; });
      each_tensor(stack[i], [&](const at::Tensor& t) {
        bool own = !t.defined() || anywhere || (t.dim() == 0 && !write);
        for (auto& pair : pairs) own = own || pair.host.is_same(t);
        foreign = foreign || !own;
        return t;
      });
    }
    TORCH_CHECK(!foreign, "Expected all tensors to be on the same device, but found at least two devices, cuda:", device,
                " and cpu! (", op.schema().name(), ")");
  }

  at::Tensor taken(const at::Tensor& t, bool write) {
    at(t.device());
    for (auto& pair : pairs)
      if (pair.gpu.is_same(t)) {
        pair.written = pair.written || write;
        return pair.host;
      }
    pairs.push_back({t, as_host(t), write});
    return pairs.back().host;
  }

  // An alias of what the device has now, if that is other memory than it was.
  void renew(Pair& pair) {
    if (pair.host.storage().data() == pair.gpu.storage().data()) return;
    at::Tensor fresh = as_host(pair.gpu);
    for (auto& value : stack) each_tensor(value, [&](const at::Tensor& t) { return t.is_same(pair.host) ? fresh : t; });
    pair.host = fresh;
  }

 private:
  bool foreign = false;
  void at(c10::Device d) {
    if (!d.is_cuda()) return;
    int index = d.has_index() ? d.index() : current;
    TORCH_CHECK(device < 0 || device == index, "Expected all tensors to be on the same device, but found at least two ",
                "devices, cuda:", device, " and cuda:", index, "!");
    device = index;
  }
};

void open_all(Opened& opened, const std::vector<Pair>& pairs) {
  for (auto& pair : pairs) opened.open(pair.host.storage().data());
}

// Where a CPU kernel has given a tensor other memory, or another shape, so has its original.
void follow(const Pair& pair, const void* before) {
  auto* impl = pair.gpu.unsafeGetTensorImpl();
  if (pair.host.storage().data() != before) {
    size_t n = pair.host.storage().nbytes();
    c10::DataPtr fresh = memory.allocate(n);
    if (n) {
      Opened opened;
      opened.open(fresh.get());
      std::memcpy(fresh.get(), pair.host.storage().data(), n);
    }
    impl->unsafe_storage().set_data_ptr_noswap(std::move(fresh));
    impl->unsafe_storage().set_nbytes(n);
  }
  if (pair.host.sizes() != pair.gpu.sizes() || pair.host.strides() != pair.gpu.strides())
    impl->set_sizes_and_strides(pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
}

at::Tensor result(const Call& call, const at::Tensor& t) {
  if (!t.defined()) return t;
  for (auto& pair : call.pairs)
    if (pair.host.is_same(t)) return pair.gpu;
  for (auto& pair : call.pairs)
    if (t.storage().data() && t.storage().data() == pair.host.storage().data()) return on_storage(pair.gpu.storage(), t);
  return brought(t, call.device);
}

// Inputs as they were before an operation that is only taken down.
struct Kept {
  std::vector<std::pair<at::Tensor, at::Tensor>> own;
  explicit Kept(const Call& call) {
    if (capturing())
      for (auto& pair : call.pairs)
        if (at::has_internal_overlap(pair.host) == at::MemOverlap::No) own.emplace_back(pair.host, pair.host.clone());
  }
  void put_back() {
    for (auto& [there, was] : own)
      if (there.sizes() == was.sizes()) there.copy_(was);
  }
};

std::vector<c10::IValue> computed(const c10::OperatorHandle& op, std::vector<c10::IValue> stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

void take_down(const c10::OperatorHandle& op, const Call& call, const std::vector<c10::IValue>& results) {
  std::vector<std::vector<at::Tensor>> fresh;  // of each result, where the device has it
  bool any = false;
  for (c10::IValue value : results) {
    fresh.emplace_back();
    each_tensor(value, [&](const at::Tensor& t) {
      bool own = t.defined();
      for (auto& pair : call.pairs) own = own && t.storage().data() != pair.gpu.storage().data();
      if (own && t.storage().data()) spoil((char*)t.storage().data(), t.storage().nbytes());
      any = any || own;
      fresh.back().push_back(own ? as_host(t) : at::Tensor());
      return t;
    });
  }
  for (auto& pair : call.pairs) any = any || pair.written;
  if (!any) return;  // a view
  std::vector<at::Tensor> used;
  for (auto& pair : call.pairs) used.push_back(pair.host);
  capturing()->actions.push_back([op, stack = call.stack, used, fresh] {
    Opened opened;
    for (auto& t : used) opened.open(t.storage().data());
    auto made = computed(op, stack);
    for (size_t i = 0; i < made.size(); ++i) {
      size_t next = 0;
      each_tensor(made[i], [&](const at::Tensor& t) {
        const at::Tensor& there = fresh[i][next++];
        if (there.defined()) {
          opened.open(there.storage().data());
          there.copy_(t);
        }
        return t;
      });
    }
  });
}

bool asks(const std::string& name) {
  return name == "aten::_local_scalar_dense" || name == "aten::nonzero" || name == "aten::masked_select" ||
         name == "aten::_unique2" || name == "aten::equal" || name == "aten::is_nonzero";
}

void kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  std::lock_guard lock(gate);
  asks(op.schema().name()) ? wait() : work();
  size_t n = op.schema().arguments().size();
  Call call(op, {stack->end() - n, stack->end()});
  Now now(call.device < 0 ? current : call.device);
  ++asked;
  std::vector<const void*> before;
  for (auto& pair : call.pairs) before.push_back(pair.host.storage().data());
  std::vector<c10::IValue> results;
  {
    Opened opened;
    open_all(opened, call.pairs);
    Kept kept(call);
    results = computed(op, call.stack);
    for (size_t i = 0; i < call.pairs.size(); ++i)
      if (call.pairs[i].written) follow(call.pairs[i], before[i]);
    kept.put_back();
    for (auto& value : results) each_tensor(value, [&](const at::Tensor& t) { return result(call, t); });
    for (auto& pair : call.pairs) call.renew(pair);
  }
  if (capturing()) take_down(op, call, results);
  stack->erase(stack->end() - n, stack->end());
  for (auto& value : results) stack->push_back(std::move(value));
}

// Who copies without waiting finds NaN until it has waited.
void unwritten(const at::Tensor& t) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (t.is_floating_point()) at::Tensor(t).fill_(NAN);
}

struct Move {  // by address on the device
  at::Tensor to, from;
  bool to_gpu, from_gpu;
  Move(const at::Tensor& a, const at::Tensor& b)
      : to(on_gpu(a) ? as_host(a) : a), from(on_gpu(b) ? as_host(b) : b), to_gpu(on_gpu(a)), from_gpu(on_gpu(b)) {}
  void operator()() const {
    Opened opened;
    if (to_gpu) opened.open(to.storage().data());
    if (from_gpu) opened.open(from.storage().data());
    at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor(to).copy_(from);
  }
};

at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  std::lock_guard lock(gate);
  bool both = on_gpu(self) && on_gpu(from);
  const at::Tensor& host = on_gpu(self) ? from : self;
  bool later = !both && non_blocking && is_pinned(host.storage().data());
  Move move(self, from);
  ++asked;
  if (!both && !later) wait();
  if (capturing()) {
    capturing()->actions.push_back(move);
  } else if (!later) {
    work();
    move();
  } else if (on_gpu(self)) {
    to_device.push_back([move, self] { move(); });  // who lets go of it does so behind the copy
  } else {
    work();
    at::Tensor now;
    {
      Opened opened;
      opened.open(from.storage().data());
      at::AutoDispatchBelowADInplaceOrView below;
      now = as_host(from).clone();
    }
    unwritten(self);
    to_host.push_back([self, now] {
      at::AutoDispatchBelowADInplaceOrView below;
      at::Tensor(self).copy_(now);
    });
  }
  return self;
}

}  // namespace
