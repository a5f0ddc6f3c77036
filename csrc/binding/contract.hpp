// The names of records and enumerations in C++, for a test that compares them with those in Python.
#pragma once

#include <string>
#include <vector>

#include "../core/statistics.hpp"
#include "records.hpp"

namespace pama {
namespace binding {

inline py::dict contract() {
    const auto names = [](const auto& array) { return std::vector<std::string>(std::begin(array), std::end(array)); };
    py::dict result;
    result["kinds"] = names(kKindNames);
    result["weights_per"] = names(kWeightsPerNames);
    result["aggregations"] = names(kAggregationNames);
    result["fields"] = names(kFieldNames);
    result["totals"] = names(kTotalNames);
    result["pairs"] = names(kPairNames);
    result["tokens"] = names(TokenNames::names);
    result["rule"] = names(RuleNames::names);
    result["outputs"] = names(OutputNames::names);
    result["results"] = names(ResultNames::names);
    std::vector<std::string> dtypes;
    for (const DtypeName& known : kDtypes) dtypes.push_back(known.name);
    result["dtypes"] = dtypes;
    return result;
}

// Functions that every native module defines.
inline void define_shared(py::module_& m) {
    const py::object base = py::module_::import("pama_kernels.backends.native").attr("NoMemory");
    py::register_local_exception<NoMemory>(m, "NoMemory", base);
    m.def("contract", &contract);
    m.def("use_exchange", &exchange::use);
}

}  // namespace binding
}  // namespace pama
