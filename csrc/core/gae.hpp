// Generalised advantage estimation (Schulman et al. 2016, equation 16), backwards over one sequence of one
// objective. Masked steps are passed over: the value that follows a step is that of the next valid one.
#pragma once

#include "config.hpp"

PAMA_BEGIN

struct GaeState {
    double value = 0;      // of the valid step that follows
    double advantage = 0;  // its advantage
};

// One valid step; afterwards state.advantage is its advantage and state.value its value.
PAMA_HD inline void gae_step(double reward, double value, bool done, double gamma, double lam, GaeState& state) {
    const double following = done ? 0 : state.value, advantage = done ? 0 : state.advantage;
    state.advantage = reward + gamma * following - value + gamma * lam * advantage;
    state.value = value;
}

PAMA_END
