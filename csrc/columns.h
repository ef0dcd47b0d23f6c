// The columns of numbers that Python passes for the parameters and layers of a network: one number
// for each parameter, or each layer, for each member of ParameterParams or LayerParams below.
//
// _C.COLUMNS hands these names to Python, so the two sides cannot disagree. Columns are called after
// the arguments of the operations in npc_ext.ops. dtype, size, outer, middle, run and neurons are
// not among these: they describe tensors, as api.h says.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>

#include "api.h"

namespace npc {

template <class Struct, class Member>
struct Column {
  const char* name;
  Member Struct::* member;
};
template <class Struct, class Member>
Column(const char*, Member Struct::*) -> Column<Struct, Member>;

constexpr std::tuple kColumns{
    Column{"dtype", &ParameterParams::dtype},  // a code of DType
    Column{"size", &ParameterParams::size},
    Column{"outer", &ParameterParams::outer},
    Column{"middle", &ParameterParams::middle},
    Column{"run", &ParameterParams::run},
    Column{"layer", &ParameterParams::layer},  // -1: none
    Column{"first_neuron", &ParameterParams::first_neuron},
    Column{"lr", &ParameterParams::lr},  // not used where the rate is in device memory
    Column{"momentum", &ParameterParams::momentum_factor},
    Column{"nesterov", &ParameterParams::nesterov},
    Column{"weight_decay", &ParameterParams::weight_decay},
    Column{"maximize", &ParameterParams::maximize},
    Column{"first_decay", &ParameterParams::first_decay},
    Column{"second_decay", &ParameterParams::second_decay},
    Column{"epsilon", &ParameterParams::epsilon},
    Column{"strength", &ParameterParams::strength},
    Column{"implicit", &ParameterParams::implicit},
    Column{"neurons", &LayerParams::neurons},
    Column{"alpha", &LayerParams::alpha},
    Column{"beta", &LayerParams::beta},
    Column{"delta", &LayerParams::delta},
    Column{"sigma", &LayerParams::error_function},  // 1: the error function; 0: sigmoid or tanh
    Column{"active_only", &LayerParams::active_only},
};

template <class Function>
void for_each_column(const Function& function) {
  std::apply([&](const auto&... columns) { (function(columns), ...); }, kColumns);
}

inline DType dtype_of(int64_t code) {
  if (code < 0 || code >= kDTypes) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

}  // namespace npc
