// The Python module: what a step takes per row, node and token, compiled. __init__.pyi says what each function gives.

#include <nanobind/nanobind.h>

#include "guessing_bindings.h"
#include "step_bindings.h"

NB_MODULE(core, module) {
    using namespace outrider;
    nb::set_leak_warnings(false);  // what a program still holds at its end is no leak
    module.attr("TAIL") = Tail::MOST;
    module.attr("RUN") = RUN;
    module.attr("GREEDY_BELOW") = GREEDY_BELOW;
    bind_rows(module);
    bind_retention(module);
    bind_plan(module);
    bind_guessing(module);
}
