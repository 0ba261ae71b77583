#pragma once

#include <cstdint>
#include <string_view>

namespace mamba3 {

// How the learning rate moves from the end of the warm-up to the end of the run.
enum class Decay : uint8_t {
  cosine,    // half a cosine from peak to floor
  wsd,       // warm-up, stable, decay: the peak, then a straight line to floor
  constant,  // the peak
};

Decay parse_decay(std::string_view name);  // throws InputError that lists the names
std::string_view name_of(Decay decay);

// The learning rate as a function of progress, the part of the run that is over once the update at
// hand is made: (step + 1) / steps, or the elapsed part of a time budget. A linear warm-up from
// zero, then the decay.
struct Schedule {
  Decay decay = Decay::cosine;
  double peak = 3e-3;
  double floor = 3e-4;
  double warmup = 0.02;  // part of the run
  double tail = 0.2;     // part of the run that wsd decays for

  double at(double progress) const;
  void check() const;  // throws InputError for rates or parts that make no sense
};

}  // namespace mamba3
