// Generalised advantage estimation (Schulman et al. 2016, equation 16), backwards over one sequence of one
// objective. Masked steps are skipped: the next value of a step is that of the next valid step.
#pragma once

#include "config.hpp"

PAMA_BEGIN

struct GaeState {
    double value = 0;      // value of the next valid step
    double advantage = 0;  // advantage of the next valid step

    // The episode ends after the step: `following` is the value of the state that follows, 0 at a terminal state.
    PAMA_HD void end(double following) {
        value = following;
        advantage = 0;
    }
};

// Processes one valid step; afterwards `state` holds the advantage and the value of this step.
PAMA_HD inline void gae_step(double reward, double value, double gamma, double lam, GaeState& state) {
    state.advantage = reward + gamma * state.value - value + gamma * lam * state.advantage;
    state.value = value;
}

PAMA_END
