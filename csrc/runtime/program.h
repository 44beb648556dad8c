// A program as the runtime executes it: numbers instead of words. Python's list of operations is this one.
#pragma once

#include <array>
#include <string>
#include <vector>

namespace paraxis {

inline constexpr std::array<const char*, 20> OPS = {
    "Load", "F", "B", "I", "W", "Update", "SendActStart", "SendActWait", "SendGradStart", "SendGradWait", "RecvActStart",
    "RecvActWait", "RecvGradStart", "RecvGradWait", "AllReduceStart", "AllReduceWait", "ReduceScatterStart",
    "ReduceScatterWait", "AllGatherStart", "AllGatherWait",
};
enum class Op : int {
    Load, F, B, I, W, Update, SendActStart, SendActWait, SendGradStart, SendGradWait, RecvActStart,
    RecvActWait, RecvGradStart, RecvGradWait, AllReduceStart, AllReduceWait, ReduceScatterStart,
    ReduceScatterWait, AllGatherStart, AllGatherWait,
};
enum class Rule : int { none, zero, step, norm, statistics, evaluate, hogwild, owner, snapshot, delta, nesterov, outer, copy };
enum class Buffer : int { none, params, grads, totals, score, statistics, running, norm, factors, moments, moment_grads, tied, snapshot, delta, momentum, acts, act_grads };
enum class Axis : int { none, dp, pp, tp };

inline constexpr std::array<const char*, 13> RULES = {"",        "zero",  "step",     "norm",  "statistics", "evaluate", "hogwild", "owner",
                                                      "snapshot", "delta", "nesterov", "outer", "copy"};
inline constexpr std::array<const char*, 17> BUFFERS = {"",        "params", "grads",   "totals",  "score",        "statistics",
                                                        "running", "norm",   "factors", "moments", "moment_grads", "tied",
                                                        "snapshot", "delta",  "momentum", "acts", "act_grads"};
inline constexpr std::array<const char*, 4> AXES = {"", "dp", "pp", "tp"};

struct Instruction {
    Op op;
    int microbatch, slice, peer;
    Axis axis;
    Buffer buffer;
    Rule rule;
    bool mean;
    int segment = 0, bucket = -1;
    int stage = -1;  // of the whole pipeline (-1: the first of its rank)
};

struct Body {
    std::string name;
    std::vector<std::vector<Instruction>> ranks;
};

}  // namespace paraxis
