// Runs the body of a Metal kernel as C++, one lane after the other, and counts what it reads and writes.
//
// The kernels emulated share values between lanes only by simd_sum. So a simdgroup is run twice: first every lane adds
// its part to the sums, then every lane gets them. Lanes that do not call simd_sum equally often have diverged, which a
// device would not forgive. Reads count in the first run, writes in the second.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

typedef unsigned int uint;
struct uint3 { uint x, y, z; };
namespace metal { using std::exp; }

template <typename To> To as_type(uint32_t bits) {
    To value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {  // to the nearest, ties to even
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        bits = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    }
    operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

enum Fault { NONE, READ_OUTSIDE, WRITTEN_OUTSIDE, DIVERGED, MISALIGNED, UNKNOWN_BITS };
static Fault fault = NONE;

struct Simdgroup {
    bool is_adding;
    size_t calls;
    std::vector<float> sums;
};
static Simdgroup simdgroup;

static float simd_sum(float value) {
    const size_t call = simdgroup.calls++;
    if (simdgroup.is_adding) {
        if (call >= simdgroup.sums.size()) simdgroup.sums.resize(call + 1, 0.0f);
        simdgroup.sums[call] += value;
    }
    return call < simdgroup.sums.size() ? simdgroup.sums[call] : 0.0f;
}

template <typename T> struct Input {
    const T* data;
    size_t size;
    uint32_t* reads;
    T operator[](size_t i) const {
        if (i >= size) {
            fault = READ_OUTSIDE;
            return T(0);
        }
        if (simdgroup.is_adding) ++reads[i];
        return data[i];
    }
};

template <int N, typename T> Several<N, T> read_several(const Input<T>& from, size_t index) {
    if (index * sizeof(T) % (N * sizeof(T) < 16 ? N * sizeof(T) : 16)) fault = MISALIGNED;
    Several<N, T> several;
    for (int i = 0; i < N; ++i) several.values[i] = from[index + i];
    return several;
}

template <typename T> struct Output {
    T* data;
    size_t size;
    uint32_t* writes;
    struct Cell {
        const Output& array;
        size_t i;
        void operator=(T value) const {
            if (i >= array.size) fault = WRITTEN_OUTSIDE;
            else if (!simdgroup.is_adding) {
                array.data[i] = value;
                ++array.writes[i];
            }
        }
    };
    Cell operator[](size_t i) const { return Cell{*this, i}; }
};

// lane(thread_position_in_grid, thread_index_in_simdgroup) for 32 * y * z threads, a simdgroup for each (y, z).
template <typename Lane> int run_grid(uint y, uint z, Lane lane) {
    fault = NONE;
    for (uint tile = 0; tile < z; ++tile) {
        for (uint block = 0; block < y; ++block) {
            simdgroup.sums.clear();
            for (int pass = 0; pass < 2; ++pass) {
                simdgroup.is_adding = pass == 0;
                for (uint index = 0; index < 32; ++index) {
                    simdgroup.calls = 0;
                    lane(uint3{index, block, tile}, index);
                    if (pass == 1 && simdgroup.calls != simdgroup.sums.size()) fault = DIVERGED;
                }
            }
        }
    }
    return fault;
}
