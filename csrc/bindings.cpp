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
using Int64s = std::vector<int64_t>;
using npc::ImportanceParams;
using npc::LayerParams;
using npc::ParameterParams;
using npc::Table;
using npc::UpdateParams;

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// From the sizes and strides of [batch, neurons, positions...], with the dimensions in any order.
// Dimensions of positions that one stride walks through in both tensors are merged, so that most
// layouts have one at most.
ImportanceParams importance_params(Address activation, Address gradient, Address out, int64_t dtype,
                                   const Int64s& sizes, const Int64s& activation_strides,
                                   const Int64s& gradient_strides, int channel_dim, int batch_dim) {
  const int dims = static_cast<int>(sizes.size());
  if (dims < 2 || activation_strides.size() != sizes.size() || gradient_strides.size() != sizes.size() ||
      channel_dim < 0 || channel_dim >= dims || batch_dim < 0 || batch_dim >= dims || channel_dim == batch_dim) {
    throw std::invalid_argument("importance: sizes, strides, channel_dim and batch_dim disagree");
  }
  ImportanceParams p{};
  p.activation = pointer<const void>(activation);
  p.gradient = pointer<const void>(gradient);
  p.out = pointer<void>(out);
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

// Runs the CPU kernels on so many threads at most.
struct Threads {
  int count;

  void importance(const ImportanceParams& params) const { npc::cpu::launch_importance(params, count); }
  void update(const UpdateParams& params) const { npc::cpu::launch_update(params, count); }
  void adam_update(const UpdateParams& params) const { npc::cpu::launch_adam_update(params, count); }
  void anchored_update(const UpdateParams& params) const { npc::cpu::launch_anchored_update(params, count); }
  void connection_update(const UpdateParams& params) const { npc::cpu::launch_connection_update(params, count); }
  void network_step(const ImportanceParams* inputs, const UpdateParams& params) const {
    npc::cpu::launch_network_step(inputs, params, count);
  }
};

#if defined(NPC_CUDA)
// Runs the CUDA kernels on a stream.
struct OnStream {
  npc::cuda::Stream stream;

  void importance(const ImportanceParams& params) const { npc::cuda::launch_importance(params, stream); }
  void update(const UpdateParams& params) const { npc::cuda::launch_update(params, stream); }
  void adam_update(const UpdateParams& params) const { npc::cuda::launch_adam_update(params, stream); }
  void anchored_update(const UpdateParams& params) const { npc::cuda::launch_anchored_update(params, stream); }
  void connection_update(const UpdateParams& params) const { npc::cuda::launch_connection_update(params, stream); }
  void network_step(const ImportanceParams* inputs, const UpdateParams& params) const {
    npc::cuda::launch_network_step(inputs, params, stream);
  }
};
#endif

template <class Target>
void importance(const Target& target, Address activation, Address gradient, Address out, Address gradient_in,
                int64_t dtype, const Int64s& sizes, const Int64s& activation_strides, const Int64s& gradient_strides,
                int channel_dim, int batch_dim) {
  ImportanceParams params = importance_params(activation, gradient, out, dtype, sizes, activation_strides,
                                              gradient_strides, channel_dim, batch_dim);
  params.gradient_in = pointer<void>(gradient_in);
  const py::gil_scoped_release released;
  target.importance(params);
}

using Addresses = std::vector<Address>;

void check_sizes(bool fit, const char* message) {
  if (!fit) throw std::invalid_argument(message);
}

// The layers and parameters that one call changes. tables.h says what the tables hold.
struct Network {
  std::vector<LayerParams> layers;
  std::vector<ParameterParams> parameters;
  UpdateParams params;

  Network(const Addresses& values, const Addresses& gradients, const Addresses& momentum, const Addresses& lr,
          const py::buffer& parameter_numbers, const py::buffer& parameter_options, const Addresses& nonfinite_steps,
          const py::buffer& layer_numbers, const py::buffer& layer_options, Address grad_scale, Address found_inf)
      : layers(nonfinite_steps.size()), parameters(values.size()) {
    check_sizes(gradients.size() == values.size() && momentum.size() == values.size() &&
                    (lr.empty() || lr.size() == values.size()),
                "every parameter needs a gradient and a momentum entry, and an lr entry if any has one");
    const Table numbers(npc::kParameterNumbers, parameter_numbers, values.size());
    const Table options(npc::kParameterOptions, parameter_options, values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      ParameterParams& p = parameters[i];
      numbers.read(i, p);
      options.read(i, p);
      p.value = pointer<void>(values[i]);
      p.gradient = pointer<const void>(gradients[i]);
      p.momentum = pointer<void>(momentum[i]);
      p.lr_address = lr.empty() ? nullptr : pointer<const float>(lr[i]);
      check_sizes(p.layer < static_cast<int64_t>(layers.size()), "layer out of range");
      check_sizes(p.first_neuron >= 0 && p.first_neuron <= INT32_MAX, "first_neuron out of range");
    }
    const Table sizes(npc::kLayerNumbers, layer_numbers, layers.size());
    const Table constants(npc::kLayerOptions, layer_options, layers.size());
    for (size_t l = 0; l < layers.size(); ++l) {
      sizes.read(l, layers[l]);
      constants.read(l, layers[l]);
      layers[l].nonfinite_steps = pointer<int64_t>(nonfinite_steps[l]);
    }
    params = UpdateParams{layers.data(),
                          static_cast<int64_t>(layers.size()),
                          parameters.data(),
                          static_cast<int64_t>(parameters.size()),
                          pointer<const float>(grad_scale),
                          pointer<const float>(found_inf)};
  }

  // `steps` and `seeds` may be empty. A seed below 0 means rounding to nearest.
  void count_steps(const Addresses& steps, const Int64s& seeds) {
    check_sizes((steps.empty() || steps.size() == parameters.size()) &&
                    (seeds.empty() || (seeds.size() == parameters.size() && steps.size() == seeds.size())),
                "every parameter needs a steps entry if any has one, and a seed if any is rounded stochastically");
    for (size_t i = 0; i < steps.size(); ++i) parameters[i].steps = pointer<float>(steps[i]);
    for (size_t i = 0; i < seeds.size(); ++i) {
      check_sizes(seeds[i] < 0 || steps[i] != 0, "a parameter that is rounded stochastically counts its steps");
      parameters[i].stochastic_rounding = seeds[i] >= 0;
      parameters[i].seed = static_cast<uint32_t>(seeds[i]);
    }
  }

  void importance_of_layers(const Addresses& importances, const Addresses& measured) {
    check_sizes(importances.size() == layers.size() && measured.size() == layers.size(),
                "every layer needs an importance, a measured and a nonfinite_steps entry");
    for (size_t l = 0; l < layers.size(); ++l) {
      layers[l].importance = pointer<float>(importances[l]);
      layers[l].measured = pointer<const float>(measured[l]);
    }
  }
};

template <class Target>
void update(const Target& target, const Addresses& values, const Addresses& gradients, const Addresses& momentum,
            const Addresses& lr, const py::buffer& parameter_numbers, const py::buffer& parameter_options,
            const Addresses& importances, const Addresses& measured, const Addresses& nonfinite_steps,
            const py::buffer& layer_numbers, const py::buffer& layer_options, Address grad_scale, Address found_inf,
            const Addresses& steps, const Int64s& seeds) {
  Network network(values, gradients, momentum, lr, parameter_numbers, parameter_options, nonfinite_steps, layer_numbers,
                  layer_options, grad_scale, found_inf);
  network.importance_of_layers(importances, measured);
  network.count_steps(steps, seeds);
  const py::gil_scoped_release released;
  target.update(network.params);
}

// Every parameter has a first and a second moment.
template <class Target>
void adam_update(const Target& target, const Addresses& values, const Addresses& gradients, const Addresses& momentum,
                 const Addresses& lr, const py::buffer& parameter_numbers, const py::buffer& parameter_options,
                 const Addresses& first_moments, const Addresses& second_moments, const py::buffer& adam_options,
                 const Addresses& importances, const Addresses& measured, const Addresses& nonfinite_steps,
                 const py::buffer& layer_numbers, const py::buffer& layer_options, Address grad_scale,
                 Address found_inf, const Addresses& steps, const Int64s& seeds) {
  Network network(values, gradients, momentum, lr, parameter_numbers, parameter_options, nonfinite_steps, layer_numbers,
                  layer_options, grad_scale, found_inf);
  network.importance_of_layers(importances, measured);
  network.count_steps(steps, seeds);
  const size_t count = values.size();
  check_sizes(first_moments.size() == count && second_moments.size() == count && steps.size() == count,
              "every parameter needs two moments and a steps entry");
  const Table options(npc::kAdamOptions, adam_options, count);
  for (size_t i = 0; i < count; ++i) {
    ParameterParams& p = network.parameters[i];
    options.read(i, p);
    check_sizes(p.momentum == nullptr && p.steps != nullptr, "Adam has moments in place of momentum, and counts steps");
    p.first_moment = pointer<void>(first_moments[i]);
    p.second_moment = pointer<void>(second_moments[i]);
  }
  const py::gil_scoped_release released;
  target.adam_update(network.params);
}

// stiffness, anchors and paths: an address for each parameter, or 0.
template <class Target>
void anchored_update(const Target& target, const Addresses& values, const Addresses& gradients,
                     const Addresses& momentum, const Addresses& lr, const py::buffer& parameter_numbers,
                     const py::buffer& parameter_options, const Addresses& stiffness, const Addresses& anchors,
                     const Addresses& paths, const py::buffer& anchor_options, const py::buffer& layer_numbers,
                     const py::buffer& layer_options, Address grad_scale, Address found_inf) {
  Network network(values, gradients, momentum, lr, parameter_numbers, parameter_options, {}, layer_numbers,
                  layer_options, grad_scale, found_inf);
  const size_t count = values.size();
  check_sizes(stiffness.size() == count && anchors.size() == count && paths.size() == count,
              "every parameter needs a stiffness, an anchor and a path entry");
  const Table options(npc::kAnchorOptions, anchor_options, count);
  for (size_t i = 0; i < count; ++i) {
    ParameterParams& p = network.parameters[i];
    options.read(i, p);
    check_sizes(p.layer < 0, "a parameter with an anchor belongs to no layer");
    check_sizes((stiffness[i] == 0) == (anchors[i] == 0), "stiffness and anchor go together");
    p.stiffness = pointer<const void>(stiffness[i]);
    p.anchor = pointer<const void>(anchors[i]);
    p.path = pointer<void>(paths[i]);
  }
  const py::gil_scoped_release released;
  target.anchored_update(network.params);
}

// importances: an address for each parameter, or 0 where it belongs to no layer.
template <class Target>
void connection_update(const Target& target, const Addresses& values, const Addresses& gradients,
                       const Addresses& momentum, const Addresses& lr, const py::buffer& parameter_numbers,
                       const py::buffer& parameter_options, const Addresses& importances,
                       const Addresses& nonfinite_steps, const py::buffer& layer_numbers,
                       const py::buffer& layer_options, Address grad_scale, Address found_inf) {
  Network network(values, gradients, momentum, lr, parameter_numbers, parameter_options, nonfinite_steps, layer_numbers,
                  layer_options, grad_scale, found_inf);
  check_sizes(importances.size() == values.size(), "every parameter needs an importance entry");
  for (size_t i = 0; i < values.size(); ++i) {
    ParameterParams& p = network.parameters[i];
    check_sizes(p.size == 0 || (p.layer < 0) == (importances[i] == 0),
                "connections of a layer need an importance, others have none");
    p.importance = pointer<float>(importances[i]);
  }
  const py::gil_scoped_release released;
  target.connection_update(network.params);
}

using ImportanceInput = std::tuple<Address, Address, int64_t, Int64s, Int64s, Int64s, int, int>;

template <class Target>
void network_step(const Target& target, const std::vector<ImportanceInput>& inputs, const Addresses& values,
                  const Addresses& gradients, const Addresses& momentum, const Addresses& lr,
                  const py::buffer& parameter_numbers, const py::buffer& parameter_options,
                  const Addresses& importances, const Addresses& nonfinite_steps, const py::buffer& layer_numbers,
                  const py::buffer& layer_options, Address grad_scale, Address found_inf) {
  check_sizes(inputs.size() == importances.size(), "every layer needs an activation and its gradient");
  std::vector<ImportanceParams> params;
  for (const auto& [activation, gradient, dtype, sizes, strides_n, strides_g, channel_dim, batch_dim] : inputs) {
    params.push_back(
        importance_params(activation, gradient, 0, dtype, sizes, strides_n, strides_g, channel_dim, batch_dim));
  }
  Network network(values, gradients, momentum, lr, parameter_numbers, parameter_options, nonfinite_steps, layer_numbers,
                  layer_options, grad_scale, found_inf);
  network.importance_of_layers(importances, Addresses(importances.size(), 0));  // measured in scratch
  const py::gil_scoped_release released;
  target.network_step(params.data(), network.params);
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

py::list isas() {
  py::list names;
  for (int index = 0; index < npc::cpu::isa_count(); ++index) {
    if (npc::cpu::isa_runs_here(index)) names.append(npc::cpu::isa_name(index));
  }
  return names;
}

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
  m.attr("COLUMNS") = npc::column_names();
  py::module_ cpu = m.def_submodule("cpu");
  py::class_<Threads>(cpu, "Threads", py::module_local()).def(py::init([](int count) { return Threads{count}; }));
  define_kernels<Threads>(cpu);
  m.def("isas", &isas, "Instruction sets compiled in that this processor runs, best last.");
  m.def("isa_in_use", &npc::cpu::isa_in_use);
  m.def("use_isa", &npc::cpu::use_isa);
#if defined(NPC_CUDA)
  m.attr("cuda_archs") = NPC_EXT_CUDA_ARCHS;
  py::module_ cuda = m.def_submodule("cuda");
  py::class_<OnStream>(cuda, "OnStream", py::module_local()).def(py::init([](int device, Address stream) {
    return OnStream{{device, pointer<void>(stream)}};
  }));
  cuda.def("workspace_bytes", &npc::cuda::workspace_bytes, "The bytes of scratch memory that are kept on a device.");
  cuda.def("why_not_on", &why_not_on,
           "Why the kernels do not run on a device (an empty string if they do), and whether they would if they were "
           "compiled for it.");
  cuda.def("versions", &versions,
           "CUDA versions, as in 12040 for 12.4, of the runtime and the driver (0: there is none); the oldest that the "
           "driver must support, and that driver's name.");
  define_kernels<OnStream>(cuda);
#else
  m.attr("why_no_cuda") = NPC_EXT_WHY_NO_CUDA;
#endif
}
