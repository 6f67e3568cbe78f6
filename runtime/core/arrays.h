// Between numpy's arrays and C++'s spans and vectors.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

namespace outrider {

namespace nb = nanobind;

using Tokens = std::vector<int>;

// Arguments: arrays of another type or layout are converted
template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
using Int32s = In<int32_t>;
using Int64s = In<int64_t>;
using Bools = In<bool>;
using Doubles = In<double>;

template <class T>
using Out = nb::ndarray<nb::numpy, T>;

template <class T, class... Options>
std::span<const std::remove_const_t<T>> span_of(const nb::ndarray<T, Options...>& array) {
    return {array.data(), array.size()};
}

// A new array of this shape, which `fill` writes
template <class T, class Fill>
Out<T> made(std::initializer_list<size_t> shape, Fill&& fill) {
    size_t count = 1;
    for (const size_t length : shape) count *= length;
    auto values = std::make_unique<T[]>(count);
    fill(values.get());
    const nb::capsule owner(values.get(), [](void* memory) noexcept { delete[] static_cast<T*>(memory); });
    return Out<T>(values.release(), shape, owner);
}

template <class T>
Out<T> copied(const std::vector<T>& values) {
    return made<T>({values.size()}, [&](T* to) { std::copy(values.begin(), values.end(), to); });
}

inline Out<bool> flags(const std::vector<uint8_t>& values, std::initializer_list<size_t> shape) {
    return made<bool>(shape, [&](bool* to) { std::copy(values.begin(), values.end(), to); });
}

// The attribute `name`: a vector of the object's, as a view of its memory; in so many lines, where they are several
template <class Bound, class T, class Owner>
void bind_view(Bound& bound, const char* name, std::vector<T> Owner::* values, size_t num_lines = 0) {
    const auto get = [=](nb::handle self) {
        auto& found = nb::cast<Owner&>(self).*values;
        const size_t shape[] = {num_lines ? num_lines : found.size(), num_lines ? found.size() / num_lines : 1};
        return Out<T>(found.data(), num_lines ? 2 : 1, shape, self);
    };
    bound.def_prop_ro(name, get, nb::rv_policy::automatic);
}

}  // namespace outrider
