// Generalised advantage estimation (Schulman et al. 2016, equation 16), backwards over one sequence of one
// objective. Masked steps are passed over: the value that follows a step is that of the next valid one.
#pragma once

#include "config.hpp"

PAMA_BEGIN

struct GaeState {
    double value = 0;      // that follows the step: of the next valid one
    double advantage = 0;  // its advantage

    // The episode ends after the step: what follows has this value, 0 at a terminal state.
    PAMA_HD void end(double following) {
        value = following;
        advantage = 0;
    }
};

// One valid step; afterwards state.advantage is its advantage and state.value its value.
PAMA_HD inline void gae_step(double reward, double value, double gamma, double lam, GaeState& state) {
    state.advantage = reward + gamma * state.value - value + gamma * lam * state.advantage;
    state.value = value;
}

PAMA_END
