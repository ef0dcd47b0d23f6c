// The module npc_ext._C: takes numbers and addresses, fills the structs of api.h, releases the
// interpreter lock and launches the kernels.
//
// Python holds every tensor until the call returns, and the parameters of a Network as long as it
// exists. Python also checks shapes, dtypes and devices. The checks here only make sure that the
// arguments fit each other, so that nothing is read past their ends.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "api.h"
#include "columns.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Int64s = std::vector<int64_t>;
using npc::ImportanceParams;
using npc::LayerParams;
using npc::ParameterParams;
using npc::UpdateParams;

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// activation, gradient, dtype, sizes, the strides of both, channel_dim, batch_dim
using ImportanceInput = std::tuple<Address, Address, int64_t, Int64s, Int64s, Int64s, int, int>;

// From the sizes and strides of [batch, neurons, positions...], with the dimensions in any order.
// Dimensions of positions that one stride walks through in both tensors are merged, so that most
// layouts have one at most.
ImportanceParams importance_params(const ImportanceInput& input) {
  const auto& [activation, gradient, dtype, sizes, activation_strides, gradient_strides, channel_dim, batch_dim] =
      input;
  const int dims = static_cast<int>(sizes.size());
  if (dims < 2 || activation_strides.size() != sizes.size() || gradient_strides.size() != sizes.size() ||
      channel_dim < 0 || channel_dim >= dims || batch_dim < 0 || batch_dim >= dims || channel_dim == batch_dim) {
    throw std::invalid_argument("importance: sizes, strides, channel_dim and batch_dim disagree");
  }
  ImportanceParams p{};
  p.activation = pointer<const void>(activation);
  p.gradient = pointer<const void>(gradient);
  p.dtype = npc::dtype_of(dtype);
  p.batch = sizes[batch_dim];
  p.neurons = sizes[channel_dim];
  p.activation_batch_stride = activation_strides[batch_dim];
  p.gradient_batch_stride = gradient_strides[batch_dim];
  p.activation_neuron_stride = activation_strides[channel_dim];
  p.gradient_neuron_stride = gradient_strides[channel_dim];
  for (int dim = 0; dim < dims; ++dim) {
    if (dim == batch_dim || dim == channel_dim || sizes[dim] == 1) continue;
    const int64_t size = sizes[dim], stride_n = activation_strides[dim], stride_g = gradient_strides[dim];
    const int last = p.position_dims - 1;
    if (last >= 0 && p.activation_position_stride[last] == stride_n * size &&
        p.gradient_position_stride[last] == stride_g * size) {
      p.position_size[last] *= size;
      p.activation_position_stride[last] = stride_n;
      p.gradient_position_stride[last] = stride_g;
      continue;
    }
    if (p.position_dims == npc::kMaxPositionDims) {
      throw std::invalid_argument(
          "importance: more than 8 position dimensions that no common stride merges; "
          "pass contiguous tensors");
    }
    p.position_size[p.position_dims] = size;
    p.activation_position_stride[p.position_dims] = stride_n;
    p.gradient_position_stride[p.position_dims] = stride_g;
    ++p.position_dims;
  }
  return p;
}

// Target is where a kernel runs: cpu::Threads or cuda::Stream. It selects the launch_...() functions
// of its namespace.
template <class Target>
void importance(const Target& target, Address activation, Address gradient, Address out, Address gradient_in,
                int64_t dtype, const Int64s& sizes, const Int64s& activation_strides, const Int64s& gradient_strides,
                int channel_dim, int batch_dim) {
  ImportanceParams params = importance_params(
      {activation, gradient, dtype, sizes, activation_strides, gradient_strides, channel_dim, batch_dim});
  params.out = pointer<void>(out);
  params.gradient_in = pointer<void>(gradient_in);
  const py::gil_scoped_release released;
  launch_importance(params, target);
}

void check(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

// The parameters and layers of a network. Columns of numbers (columns.h) are read once. Each call sets
// the addresses that it needs, so calls from several threads at the same time need an object each.
//
// Lists of addresses have an entry for each parameter, or each layer. 0 is null, and so are all
// entries of a list that may be empty and is.
class Network {
 public:
  // The columns of Adam and of anchors may be missing. `lr` may be empty.
  Network(const Addresses& values, const Addresses& lr, size_t layers, const py::dict& columns)
      : layers_(layers), parameters_(values.size()) {
    set("values", &ParameterParams::value, values);
    set("lr", &ParameterParams::lr_address, lr, kMayBeEmpty);
    npc::for_each_column([&](const auto& column) {
      if (columns.contains(column.name)) {
        read(column, columns[column.name]);
      } else {
        missing_.insert(column.name);
      }
    });
    for (const std::string& name : missing_) check(kOptional.count(name), "a column is missing that all updates read");
    for (const ParameterParams& p : parameters_) {
      check(p.size == 0 || (p.outer > 0 && p.middle > 0 && p.run > 0), "a parameter has no layout");
      check(p.layer < static_cast<int64_t>(layers), "layer out of range");
      check(p.first_neuron >= 0 && p.first_neuron <= INT32_MAX, "first_neuron out of range");
    }
  }

  void require(std::initializer_list<const char*> columns) const {
    for (const char* name : columns) {
      if (missing_.count(name)) throw std::invalid_argument(std::string("the network has no column ") + name);
    }
  }

  void set_columns(const py::dict& columns) {
    npc::for_each_column([&](const auto& column) {
      if (columns.contains(column.name)) read(column, columns[column.name]);
    });
  }

  void set_gradients(const Addresses& gradients, const Addresses& momentum) {
    set("gradients", &ParameterParams::gradient, gradients);
    set("momentum", &ParameterParams::momentum, momentum, kMayBeEmpty);
  }

  void set_moments(const Addresses& first, const Addresses& second) {
    require({"first_decay", "second_decay", "epsilon"});
    set("first_moments", &ParameterParams::first_moment, first);
    set("second_moments", &ParameterParams::second_moment, second);
  }

  void set_anchors(const Addresses& stiffness, const Addresses& anchors, const Addresses& paths) {
    require({"strength", "implicit"});
    set("stiffness", &ParameterParams::stiffness, stiffness);
    set("anchors", &ParameterParams::anchor, anchors);
    set("paths", &ParameterParams::path, paths);
    for (const ParameterParams& p : parameters_) {
      check(p.layer < 0, "a parameter with an anchor belongs to no layer");
      check((p.stiffness == nullptr) == (p.anchor == nullptr), "stiffness and anchor go together");
    }
  }

  void set_importances_of_connections(const Addresses& importances, const Addresses& nonfinite_steps) {
    set("importances", &ParameterParams::importance, importances);
    set("nonfinite_steps", &LayerParams::nonfinite_steps, nonfinite_steps);
    for (const ParameterParams& p : parameters_) {
      check(p.size == 0 || (p.layer < 0) == (p.importance == nullptr),
            "connections of a layer need an importance, others have none");
    }
  }

  void set_importances(const Addresses& importances, const Addresses& nonfinite_steps, const Addresses& measured) {
    set("importances", &LayerParams::importance, importances);
    set("nonfinite_steps", &LayerParams::nonfinite_steps, nonfinite_steps);
    set("measured", &LayerParams::measured, measured, kMayBeEmpty);
    for (const ParameterParams& p : parameters_) check(is_in_layer(p), "a parameter has more rows than its layer");
  }

  // A seed below 0 means rounding to nearest. Both lists may be empty.
  void set_steps(const Addresses& steps, const Int64s& seeds) {
    set("steps", &ParameterParams::steps, steps, kMayBeEmpty);
    if (!seeds.empty()) check_length("seeds", seeds.size(), parameters_.size());
    for (size_t i = 0; i < parameters_.size(); ++i) {
      ParameterParams& p = parameters_[i];
      const int64_t seed = seeds.empty() ? -1 : seeds[i];
      check(seed < 0 || p.steps != nullptr, "a parameter that is rounded stochastically counts its steps");
      p.stochastic_rounding = seed >= 0;
      p.seed = static_cast<uint32_t>(seed);
    }
  }

  size_t layer_count() const { return layers_.size(); }

  UpdateParams params(Address grad_scale, Address found_inf) {
    return {layers_.data(),
            static_cast<int64_t>(layers_.size()),
            parameters_.data(),
            static_cast<int64_t>(parameters_.size()),
            pointer<const float>(grad_scale),
            pointer<const float>(found_inf)};
  }

 private:
  static constexpr bool kMayBeEmpty = true;
  inline static const std::set<std::string> kOptional{"first_decay", "second_decay", "epsilon", "strength", "implicit"};

  // Whether a layer has all neurons whose rows a parameter holds.
  bool is_in_layer(const ParameterParams& p) const {
    if (p.layer < 0 || p.size == 0) return true;
    const int64_t groups = p.size / (p.outer * p.middle * p.run);
    return p.first_neuron + p.middle * groups <= layers_[p.layer].neurons;
  }

  std::vector<LayerParams>& rows(LayerParams*) { return layers_; }
  std::vector<ParameterParams>& rows(ParameterParams*) { return parameters_; }

  static void check_length(const char* name, size_t length, size_t expected) {
    if (length == expected) return;
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(length) + " entries, expected " +
                                std::to_string(expected));
  }

  template <class Struct, class T>
  void set(const char* name, T* Struct::* member, const Addresses& addresses, bool may_be_empty = false) {
    std::vector<Struct>& structs = rows(static_cast<Struct*>(nullptr));
    const bool all_null = may_be_empty && addresses.empty();
    if (!all_null) check_length(name, addresses.size(), structs.size());
    for (size_t i = 0; i < structs.size(); ++i) structs[i].*member = all_null ? nullptr : pointer<T>(addresses[i]);
  }

  template <class Struct, class Member>
  void read(const npc::Column<Struct, Member>& column, const py::handle& numbers) {
    std::vector<Struct>& structs = rows(static_cast<Struct*>(nullptr));
    check_length(column.name, py::len(numbers), structs.size());
    size_t i = 0;
    for (const py::handle number : numbers) {
      if constexpr (std::is_same_v<Member, npc::DType>) {
        structs[i++].*column.member = npc::dtype_of(number.cast<int64_t>());
      } else {
        structs[i++].*column.member = number.cast<Member>();
      }
    }
  }

  std::vector<LayerParams> layers_;
  std::vector<ParameterParams> parameters_;
  std::set<std::string> missing_;  // columns
};

template <class Target>
void update(const Target& target, Network& network, const Addresses& gradients, const Addresses& momentum,
            Address grad_scale, Address found_inf, const Addresses& importances, const Addresses& nonfinite_steps,
            const Addresses& measured, const Addresses& steps, const Int64s& seeds) {
  network.set_gradients(gradients, momentum);
  network.set_importances(importances, nonfinite_steps, measured);
  network.set_steps(steps, seeds);
  const UpdateParams params = network.params(grad_scale, found_inf);
  const py::gil_scoped_release released;
  launch_update(params, target);
}

template <class Target>
void adam_update(const Target& target, Network& network, const Addresses& gradients, const Addresses& momentum,
                 Address grad_scale, Address found_inf, const Addresses& importances, const Addresses& nonfinite_steps,
                 const Addresses& measured, const Addresses& steps, const Int64s& seeds, const Addresses& first_moments,
                 const Addresses& second_moments) {
  check(momentum.empty(), "Adam has moments in place of momentum");
  network.set_gradients(gradients, momentum);
  network.set_importances(importances, nonfinite_steps, measured);
  for (const Address address : steps) check(address != 0, "Adam counts the steps of every parameter");
  check(steps.size() == gradients.size(), "Adam counts the steps of every parameter");
  network.set_steps(steps, seeds);
  network.set_moments(first_moments, second_moments);
  const UpdateParams params = network.params(grad_scale, found_inf);
  const py::gil_scoped_release released;
  launch_adam_update(params, target);
}

template <class Target>
void anchored_update(const Target& target, Network& network, const Addresses& gradients, const Addresses& momentum,
                     Address grad_scale, Address found_inf, const Addresses& stiffness, const Addresses& anchors,
                     const Addresses& paths) {
  network.set_gradients(gradients, momentum);
  network.set_anchors(stiffness, anchors, paths);
  const UpdateParams params = network.params(grad_scale, found_inf);
  const py::gil_scoped_release released;
  launch_anchored_update(params, target);
}

template <class Target>
void connection_update(const Target& target, Network& network, const Addresses& gradients, const Addresses& momentum,
                       Address grad_scale, Address found_inf, const Addresses& importances,
                       const Addresses& nonfinite_steps) {
  network.set_gradients(gradients, momentum);
  network.set_importances_of_connections(importances, nonfinite_steps);
  const UpdateParams params = network.params(grad_scale, found_inf);
  const py::gil_scoped_release released;
  launch_connection_update(params, target);
}

// What `inputs` measure is kept in scratch memory.
template <class Target>
void network_step(const Target& target, Network& network, const Addresses& gradients, const Addresses& momentum,
                  Address grad_scale, Address found_inf, const Addresses& importances, const Addresses& nonfinite_steps,
                  const std::vector<ImportanceInput>& inputs) {
  check(inputs.size() == network.layer_count(), "every layer needs an activation and its gradient");
  std::vector<ImportanceParams> measurements;
  for (const auto& input : inputs) measurements.push_back(importance_params(input));
  network.set_gradients(gradients, momentum);
  network.set_importances(importances, nonfinite_steps, {});
  const UpdateParams params = network.params(grad_scale, found_inf);
  const py::gil_scoped_release released;
  launch_network_step(measurements.data(), params, target);
}

#if defined(NPC_CUDA)
std::pair<std::string, bool> why_not_on(int device) {
  const py::gil_scoped_release released;
  const npc::cuda::Obstacle obstacle = npc::cuda::why_not_on(device, NPC_EXT_CUDA_ARCHS);
  return {obstacle.sentence, obstacle.needs_other_code};
}

std::tuple<int, int, int, std::string> versions() {
  const npc::cuda::Versions all = npc::cuda::versions();
  return {all.runtime, all.driver, all.needed_driver, all.needed_driver_name};
}
#endif

template <class Target>
void define_kernels(py::module_& m) {
  m.def("importance", &importance<Target>);
  m.def("update", &update<Target>);
  m.def("adam_update", &adam_update<Target>);
  m.def("anchored_update", &anchored_update<Target>);
  m.def("connection_update", &connection_update<Target>);
  m.def("network_step", &network_step<Target>);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of npc_ext; npc_ext.ops is the interface to use.";
  m.attr("build_key") = NPC_EXT_BUILD_KEY;
  m.attr("compiler") = __VERSION__;
  py::list names;
  npc::for_each_column([&](const auto& column) { names.append(column.name); });
  m.attr("COLUMNS") = py::tuple(names);
  py::class_<Network>(m, "Network", py::module_local())
      .def(py::init<const Addresses&, const Addresses&, size_t, const py::dict&>())
      .def("set_columns", &Network::set_columns);
  py::module_ cpu = m.def_submodule("cpu");
  using npc::cpu::Threads;
  py::class_<Threads>(cpu, "Threads", py::module_local()).def(py::init([](int count) { return Threads{count}; }));
  define_kernels<Threads>(cpu);
  m.def("isas", &npc::cpu::isas, "Instruction sets compiled in that this processor runs, best last.");
  m.def("isa_in_use", &npc::cpu::isa_in_use);
  m.def("use_isa", &npc::cpu::use_isa);
#if defined(NPC_CUDA)
  m.attr("cuda_archs") = NPC_EXT_CUDA_ARCHS;
  py::module_ cuda = m.def_submodule("cuda");
  using npc::cuda::Stream;
  py::class_<Stream>(cuda, "Stream", py::module_local()).def(py::init([](int device, Address stream) {
    return Stream{device, pointer<void>(stream)};
  }));
  cuda.def("workspace_bytes", &npc::cuda::workspace_bytes, "The bytes of scratch memory that are kept on a device.");
  cuda.def("why_not_on", &why_not_on,
           "Why the kernels do not run on a device (an empty string if they do), and whether they would if they were "
           "compiled for it.");
  cuda.def("versions", &versions,
           "CUDA versions, as in 12040 for 12.4, of the runtime and the driver (0: there is none); the oldest that the "
           "driver must support, and that driver's name.");
  define_kernels<Stream>(cuda);
#else
  m.attr("why_no_cuda") = NPC_EXT_WHY_NO_CUDA;
#endif
}
