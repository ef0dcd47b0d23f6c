// The tables of numbers that Python passes for the parameters and layers of a network.
//
// A row describes one parameter or one layer. Each of its columns is a member of ParameterParams or
// LayerParams. The lists below name the columns in order. read_table() reads rows by such a list,
// and _C.COLUMNS hands the same names to Python, so the two sides cannot disagree.
//
// Columns are called after the arguments of the operations in npc_ext.ops. dtype, size, outer,
// middle, run and neurons are not among these: they describe tensors, as api.h says.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "api.h"

namespace npc {

inline DType dtype_of(int64_t code) {
  if (code < 0 || code >= kDTypes) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

template <class Struct, class Member>
struct Column {
  const char* name;
  Member Struct::* member;
};
template <class Struct, class Member>
Column(const char*, Member Struct::*) -> Column<Struct, Member>;

// The name of a table whose rows hold numbers of type Number.
template <class Number>
struct Numbers {
  const char* table;
};

// The columns of a table, in order.
template <class Number, class... Columns>
struct TableColumns {
  const char* table;
  std::tuple<Columns...> columns;

  constexpr TableColumns(const Numbers<Number>& numbers, Columns... all) : table(numbers.table), columns(all...) {}
};

constexpr TableColumns kParameterNumbers{
    Numbers<int64_t>{"parameter_numbers"},
    Column{"dtype", &ParameterParams::dtype},  // a code of DType
    Column{"size", &ParameterParams::size},
    Column{"outer", &ParameterParams::outer},
    Column{"middle", &ParameterParams::middle},
    Column{"run", &ParameterParams::run},
    Column{"layer", &ParameterParams::layer},  // -1: none
    Column{"nesterov", &ParameterParams::nesterov},
    Column{"maximize", &ParameterParams::maximize},
    Column{"first_neuron", &ParameterParams::first_neuron},
};

constexpr TableColumns kParameterOptions{
    Numbers<double>{"parameter_options"},
    Column{"lr", &ParameterParams::lr},  // not used where the rate is in device memory
    Column{"momentum", &ParameterParams::momentum_factor},
    Column{"weight_decay", &ParameterParams::weight_decay},
};

constexpr TableColumns kAdamOptions{
    Numbers<double>{"adam_options"},
    Column{"first_decay", &ParameterParams::first_decay},
    Column{"second_decay", &ParameterParams::second_decay},
    Column{"epsilon", &ParameterParams::epsilon},
};

constexpr TableColumns kAnchorOptions{
    Numbers<double>{"anchor_options"},
    Column{"strength", &ParameterParams::strength},
    Column{"implicit", &ParameterParams::implicit},
};

constexpr TableColumns kLayerNumbers{
    Numbers<int64_t>{"layer_numbers"},
    Column{"neurons", &LayerParams::neurons},
    Column{"sigma", &LayerParams::error_function},  // 1: the error function; 0: sigmoid or tanh
    Column{"active_only", &LayerParams::active_only},
};

constexpr TableColumns kLayerOptions{
    Numbers<double>{"layer_options"},
    Column{"alpha", &LayerParams::alpha},
    Column{"beta", &LayerParams::beta},
    Column{"delta", &LayerParams::delta},
};

template <class Member, class Number>
void set(Member& member, Number number) {
  member = static_cast<Member>(number);
}
template <class Number>
void set(DType& member, Number number) {
  member = dtype_of(static_cast<int64_t>(number));
}

// Reads a (rows, columns) table in a Python buffer: sets the members that the columns name, row by
// row.
template <class Number, class... Columns, class Struct>
void read_table(const TableColumns<Number, Columns...>& columns, const pybind11::buffer& buffer,
                std::vector<Struct>& rows) {
  const pybind11::buffer_info info = buffer.request();
  const size_t count = sizeof...(Columns);
  if (info.itemsize != sizeof(Number) || info.size != static_cast<int64_t>(rows.size() * count)) {
    throw std::invalid_argument(std::string(columns.table) + ": got " + std::to_string(info.size) + " values of " +
                                std::to_string(info.itemsize) + " bytes, expected " + std::to_string(rows.size()) +
                                " x " + std::to_string(count) + " of " + std::to_string(sizeof(Number)));
  }
  const Number* number = static_cast<const Number*>(info.ptr);
  for (Struct& row : rows) {
    std::apply([&](const auto&... column) { (set(row.*column.member, *number++), ...); }, columns.columns);
  }
}

// The names of the columns of every table: {"parameter_numbers": ("dtype", ...), ...}.
inline pybind11::dict column_names() {
  pybind11::dict names;
  const auto add = [&](const auto& table) {
    names[table.table] =
        std::apply([](const auto&... column) { return pybind11::make_tuple(column.name...); }, table.columns);
  };
  const auto add_all = [&](const auto&... tables) { (add(tables), ...); };
  add_all(kParameterNumbers, kParameterOptions, kAdamOptions, kAnchorOptions, kLayerNumbers, kLayerOptions);
  return names;
}

}  // namespace npc
