// The module npc_ext._C: takes numbers and addresses, fills the structs of api.h, releases the
// interpreter lock and launches the kernels.
//
// Python holds every tensor until the call returns, and nothing here keeps an address. Python also
// checks shapes, dtypes and devices. The checks here only make sure that the arguments fit each
// other, so that nothing is read past their ends.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "tables.h"

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

// The layers and parameters that one call changes, read from its arguments in order. Lists of
// addresses have an entry for each parameter, or each layer; 0 is null.
class Network {
 public:
  std::vector<ImportanceParams> inputs;
  UpdateParams params{};

  explicit Network(const py::args& arguments) : arguments_(arguments) {}

  void read_inputs() {
    for (const auto& input : next<std::vector<ImportanceInput>>()) inputs.push_back(importance_params(input));
  }

  // After read_importances().
  void check_inputs() { check(inputs.size() == layers_.size(), "every layer needs an activation and its gradient"); }

  void read_parameters() {
    parameters_.resize(length_of_next());
    read("values", parameters_, &ParameterParams::value);
    read("gradients", parameters_, &ParameterParams::gradient);
    read("momentum", parameters_, &ParameterParams::momentum);
    read("lr", parameters_, &ParameterParams::lr_address, kMayBeEmpty);
    read(npc::kParameterNumbers, parameters_);
    read(npc::kParameterOptions, parameters_);
  }

  void read_moments() {
    read("first_moments", parameters_, &ParameterParams::first_moment);
    read("second_moments", parameters_, &ParameterParams::second_moment);
    read(npc::kAdamOptions, parameters_);
    for (const ParameterParams& p : parameters_) check(p.momentum == nullptr, "Adam has moments in place of momentum");
  }

  void read_anchors() {
    read("stiffness", parameters_, &ParameterParams::stiffness);
    read("anchors", parameters_, &ParameterParams::anchor);
    read("paths", parameters_, &ParameterParams::path);
    read(npc::kAnchorOptions, parameters_);
    for (const ParameterParams& p : parameters_) {
      check(p.layer < 0, "a parameter with an anchor belongs to no layer");
      check((p.stiffness == nullptr) == (p.anchor == nullptr), "stiffness and anchor go together");
    }
  }

  void read_importances_of_connections() {
    read("importances", parameters_, &ParameterParams::importance);
    for (const ParameterParams& p : parameters_) {
      check(p.size == 0 || (p.layer < 0) == (p.importance == nullptr),
            "connections of a layer need an importance, others have none");
    }
    layers_.resize(length_of_next());  // of nonfinite_steps
  }

  void read_importances() {
    layers_.resize(length_of_next());
    read("importances", layers_, &LayerParams::importance);
  }

  void read_measured() { read("measured", layers_, &LayerParams::measured); }

  void read_nonfinite_steps() { read("nonfinite_steps", layers_, &LayerParams::nonfinite_steps); }

  void read_layers() {
    read(npc::kLayerNumbers, layers_);
    read(npc::kLayerOptions, layers_);
  }

  void read_flags() {
    params.grad_scale = pointer<const float>(next<Address>());
    params.found_inf = pointer<const float>(next<Address>());
  }

  // A seed below 0 means rounding to nearest.
  void read_steps() {
    read("steps", parameters_, &ParameterParams::steps, kMayBeEmpty);
    const Int64s seeds = next<Int64s>();
    if (!seeds.empty()) check_length("seeds", seeds.size(), parameters_.size());
    for (size_t i = 0; i < seeds.size(); ++i) {
      ParameterParams& p = parameters_[i];
      check(seeds[i] < 0 || p.steps != nullptr, "a parameter that is rounded stochastically counts its steps");
      p.stochastic_rounding = seeds[i] >= 0;
      p.seed = static_cast<uint32_t>(seeds[i]);
    }
  }

  void read_steps_of_all() {
    read_steps();
    for (const ParameterParams& p : parameters_) check(p.steps != nullptr, "Adam counts the steps of every parameter");
  }

  // After all arguments are read.
  void finish() {
    check(read_ == arguments_.size(), "too many arguments");
    for (const ParameterParams& p : parameters_) {
      check(p.layer < static_cast<int64_t>(layers_.size()), "layer out of range");
      check(p.first_neuron >= 0 && p.first_neuron <= INT32_MAX, "first_neuron out of range");
    }
    params.layers = layers_.data();
    params.layer_count = static_cast<int64_t>(layers_.size());
    params.parameters = parameters_.data();
    params.parameter_count = static_cast<int64_t>(parameters_.size());
  }

 private:
  static void check_length(const char* name, size_t length, size_t expected) {
    if (length == expected) return;
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(length) + " entries, expected " +
                                std::to_string(expected));
  }

  py::handle peek() const {
    check(read_ < arguments_.size(), "too few arguments");
    return arguments_[read_];
  }
  size_t length_of_next() const { return py::len(peek()); }

  template <class T>
  T next() {
    const py::handle argument = peek();
    ++read_;
    return argument.cast<T>();
  }

  static constexpr bool kMayBeEmpty = true;  // a list of addresses, which are all null then

  template <class Struct, class T>
  void read(const char* name, std::vector<Struct>& structs, T* Struct::* member, bool may_be_empty = false) {
    const Addresses addresses = next<Addresses>();
    if (may_be_empty && addresses.empty()) return;
    check_length(name, addresses.size(), structs.size());
    for (size_t i = 0; i < structs.size(); ++i) structs[i].*member = pointer<T>(addresses[i]);
  }

  // Reads a table.
  template <class Columns, class Struct>
  void read(const Columns& columns, std::vector<Struct>& rows) {
    npc::read_table(columns, next<py::buffer>(), rows);
  }

  const py::args& arguments_;
  size_t read_ = 0;  // how many arguments
  std::vector<LayerParams> layers_;
  std::vector<ParameterParams> parameters_;
};

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

using Part = void (Network::*)();

// Defines a function of the module that reads its arguments part by part and launches a kernel.
template <class Target, class Launch>
void define(py::module_& m, const char* name, const Launch& launch, const std::vector<Part>& parts) {
  m.def(name, [=](const Target& target, const py::args& arguments) {
    Network network(arguments);
    for (const auto& read_part : parts) (network.*read_part)();
    network.finish();
    const py::gil_scoped_release released;
    launch(network, target);
  });
}

template <class Target>
void define_kernels(py::module_& m) {
  using N = Network;
  m.def("importance", &importance<Target>);
  define<Target>(m, "update", [](const N& network, const Target& target) { launch_update(network.params, target); },
                 {&N::read_parameters, &N::read_importances, &N::read_measured, &N::read_nonfinite_steps,
                  &N::read_layers, &N::read_flags, &N::read_steps});
  define<Target>(m, "adam_update",
                 [](const N& network, const Target& target) { launch_adam_update(network.params, target); },
                 {&N::read_parameters, &N::read_moments, &N::read_importances, &N::read_measured,
                  &N::read_nonfinite_steps, &N::read_layers, &N::read_flags, &N::read_steps_of_all});
  define<Target>(m, "anchored_update",
                 [](const N& network, const Target& target) { launch_anchored_update(network.params, target); },
                 {&N::read_parameters, &N::read_anchors, &N::read_layers, &N::read_flags});
  define<Target>(m, "connection_update",
                 [](const N& network, const Target& target) { launch_connection_update(network.params, target); },
                 {&N::read_parameters, &N::read_importances_of_connections, &N::read_nonfinite_steps, &N::read_layers,
                  &N::read_flags});
  define<Target>(m, "network_step",
                 [](const N& network, const Target& target) {
                   launch_network_step(network.inputs.data(), network.params, target);
                 },
                 {&N::read_inputs, &N::read_parameters, &N::read_importances, &N::read_nonfinite_steps, &N::read_layers,
                  &N::read_flags, &N::check_inputs});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of npc_ext; npc_ext.ops is the interface to use.";
  m.attr("build_key") = NPC_EXT_BUILD_KEY;
  m.attr("compiler") = __VERSION__;
  m.attr("COLUMNS") = npc::column_names();
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
  py::class_<Stream>(cuda, "OnStream", py::module_local()).def(py::init([](int device, Address stream) {
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
