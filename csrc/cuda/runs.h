// The neurons that a parameter's elements belong to, and the plasticity with which the elements
// move.
//
// The elements of one run are contiguous and belong to one neuron (api.h). A block keeps the
// plasticity of its item's neurons in a table in shared memory, where each pack looks up that of
// its elements. If no run is shorter than a pack, a pack belongs to two neurons at most. In biases
// and transposed linear layers, each element belongs to another neuron.
#pragma once

#include "elements.h"
#include "layer.h"

namespace npc::cuda {

constexpr int kRuns = 4096;  // the most runs of an item, not counting the one in which it begins

struct Parameter : Elements {
  int64_t outer, middle, run;
  int layer, first_neuron;
};

__device__ __forceinline__ int64_t neuron_of_run(const Parameter& p, int64_t run) {
  if (p.outer == 1) return p.first_neuron + run;
  return p.first_neuron + run / (p.outer * p.middle) * p.middle + run % p.middle;
}

// Whether a parameter's neurons follow each other repeatedly, and are so few that a table holds
// them all.
__host__ __device__ inline bool repeats(const Parameter& p) {
  return p.outer > 1 && p.middle <= kRuns && p.outer * p.middle * p.run == p.size;
}

// The neurons that an item's elements belong to, as places in a table of their plasticity. The
// table goes run by run, or neuron by neuron if the parameter repeats. Lengths count elements and
// are cut to what an item can hold.
struct Runs {
  int first, others;            // the length of the item's first run and of each other run
  int place, places;            // the first run's place, and the number of places before the first comes again
  float per_other, per_places;  // 1 / others and 1 / places; 0 if places do not come again

  // floor(number / divisor), exact for numbers below 2^21.
  static __device__ __forceinline__ int divided(int number, float per_divisor) {
    return static_cast<int>((static_cast<float>(number) + 0.5f) * per_divisor);
  }

  __device__ __forceinline__ int run_of(int at) const { return at < first ? 0 : 1 + divided(at - first, per_other); }
  __device__ __forceinline__ int place_of(int run) const {
    const int at = place + run;
    return per_places == 0.0f ? at : at - divided(at, per_places) * places;
  }
};

// What is known about a pack before it is loaded.
struct PackPlasticity {
  bool any;             // whether any element has a plasticity other than 0
  float first, second;  // the plasticity of its neurons: two at most if no run is shorter than a pack
  int split;            // the element at which the second neuron begins
};

// Looks up the plasticity of an item's elements in the table.
struct FromTable {
  const Runs& runs;
  const float* table;

  template <int size>
  __device__ __forceinline__ PackPlasticity find(int at) const {
    const int run = runs.run_of(at), split = runs.first + run * runs.others - at;
    PackPlasticity found = {false, table[runs.place_of(run)], 0.0f, split};
    if (runs.others >= size) {
      found.second = split < size ? table[runs.place_of(run + 1)] : found.first;
      found.any = found.first != 0.0f || found.second != 0.0f;
    } else {
      for_each<size>(at, [&](int, float plasticity) { found.any |= plasticity != 0.0f; });
    }
    return found;
  }

  template <int size>
  __device__ __forceinline__ void expand(const PackPlasticity& found, int at, float (&plasticity)[size]) const {
    if (runs.others >= size) {
#pragma unroll
      for (int k = 0; k < size; ++k) plasticity[k] = k < found.split ? found.first : found.second;
    } else {
      for_each<size>(at, [&](int k, float of_element) { plasticity[k] = of_element; });
    }
  }

 private:
  // For packs that may belong to many neurons.
  template <int size, class Visit>
  __device__ __forceinline__ void for_each(int at, const Visit& visit) const {
    int run = runs.run_of(at), end = runs.first + run * runs.others - at;
    float current = table[runs.place_of(run)];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      if (k == end) {
        current = table[runs.place_of(++run)];
        end += runs.others;
      }
      visit(k, current);
    }
  }
};

__device__ __forceinline__ Runs runs_of(const Parameter& p, int64_t begin, int64_t first_run) {
  constexpr int most = kItem + kThreads;
  const auto at_most = [](int64_t length) { return length < most ? static_cast<int>(length) : most; };
  const int others = at_most(p.run), first = at_most((first_run + 1) * p.run - begin);
  if (!repeats(p)) return {first, others, 0, 0, 1.0f / others, 0.0f};
  const int places = static_cast<int>(p.middle);
  return {first, others, static_cast<int>(first_run % p.middle), places, 1.0f / others, 1.0f / places};
}

// Writes the first `places` places of an item's table, in the order of Runs.
__device__ inline void fill_table(const Parameter& p, const Layer& layer, const Total& total, int64_t first_run,
                                  int places, float* table) {
  for (int place = thread(); place < places; place += kThreads) {
    const int64_t neuron = repeats(p) ? p.first_neuron + place : neuron_of_run(p, first_run + place);
    table[place] = layer.plasticity != nullptr ? layer.plasticity[neuron]
                                               : plasticity_of(layer, averaged(layer, total, neuron), neuron);
  }
}

}  // namespace npc::cuda
