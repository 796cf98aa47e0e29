// The passes over whole tensors of operators/passes.py, each as one loop, for CPUs. No header but the standard library's
// is needed, so that any C++17 compiler with OpenMP builds this in some seconds.
//
// Values are (outer, groups, width, inner), a map, which has one number for each patch and group, (outer, groups, inner):
// of images with channels last (N·H·W, groups, C / groups, 1), of contiguous ones (N, groups, C / groups, H·W).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Bfloat16 {
    uint16_t bits;
};

// Arithmetic is done in float, and in double for double.
template <class T> struct Wide { using Type = float; };
template <> struct Wide<double> { using Type = double; };
template <class T> using WideOf = typename Wide<T>::Type;

inline float read(float value) { return value; }
inline double read(double value) { return value; }
inline float read(Bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void write(float &place, float value) { place = value; }
inline void write(double &place, double value) { place = value; }
inline void write(Bfloat16 &place, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // To the nearest, ties to even; what is not a number stays so.
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place.bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

struct Shape {
    int64_t outer, groups, width, inner;
};

constexpr int64_t BLOCK = 1024, LANES = 16;

// Σ value(k) for k < count, in sums that do not wait for each other, each of a part of the errors.
template <class W, class Value> W sum_of(int64_t count, Value value) {
    W sums[LANES] = {}, sum = 0;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES)
#pragma omp simd
        for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += value(k + lane);
    for (; k < count; ++k) sum += value(k);
    for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

// A width that is known to the compiler lets it work on many groups at once; 0 stands for any width.
template <int WIDTH, class W, class Value, class Total>
void sweep_rows(const Shape &shape, int threads, Value value, Total total) {
    const int64_t rows = shape.outer * shape.groups, groups = shape.groups, width = WIDTH ? WIDTH : shape.width;
    const int64_t step = std::max<int64_t>(1, 4 * BLOCK / width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < rows; start += step) {
        const int64_t stop = std::min(rows, start + step);
        if (WIDTH) {
#pragma omp simd
            for (int64_t place = start; place < stop; ++place) {
                W sum = 0;
                for (int64_t k = 0; k < WIDTH; ++k)
                    sum += value(place * WIDTH + k, place, place % groups * WIDTH + k);
                total(place, sum);
            }
        } else
            for (int64_t place = start; place < stop; ++place) {
                const int64_t channel = groups == 1 ? 0 : place % groups * width;
                total(place, sum_of<W>(width, [=](int64_t k) { return value(place * width + k, place, channel + k); }));
            }
    }
}

// Calls value(i, place, channel) for each value i, the place of its patch in a map and its channel, and total(place, sum of
// what it returned).
template <class W, class Value, class Total>
void sweep(const Shape &shape, int threads, Value value, Total total) {
    const int64_t rows = shape.outer * shape.groups, width = shape.width, inner = shape.inner;
    if (inner == 1) {
        switch (width) {
        case 1: return sweep_rows<1, W>(shape, threads, value, total);
        case 2: return sweep_rows<2, W>(shape, threads, value, total);
        case 4: return sweep_rows<4, W>(shape, threads, value, total);
        case 8: return sweep_rows<8, W>(shape, threads, value, total);
        default: return sweep_rows<0, W>(shape, threads, value, total);
        }
    }
    const int64_t blocks = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t start = block * BLOCK, size = std::min(BLOCK, inner - start);
            const int64_t place = row * inner + start;
            W sums[BLOCK] = {};
            for (int64_t k = 0; k < width; ++k) {
                const int64_t first = (row * width + k) * inner + start, channel = row % shape.groups * width + k;
#pragma omp simd
                for (int64_t j = 0; j < size; ++j) sums[j] += value(first + j, place + j, channel);
            }
#pragma omp simd
            for (int64_t j = 0; j < size; ++j) total(place + j, sums[j]);
        }
}

// map = Σ values² over each group.
template <class T> void squares(const T *values, WideOf<T> *map, Shape shape, int threads) {
    using W = WideOf<T>;
    sweep<W>(
        shape, threads,
        [=](int64_t i, int64_t, int64_t) {
            const W value = read(values[i]);
            return value * value;
        },
        [=](int64_t place, W sum) { map[place] = sum; });
}

// answer = values · |values|^(degree - 1) · map + bias, for a degree of 1 or 2; no bias is null.
template <int DEGREE, bool BIAS, class T>
void scale(const T *values, const WideOf<T> *map, const WideOf<T> *bias, T *answer, Shape shape, int threads) {
    using W = WideOf<T>;
    sweep<W>(
        shape, threads,
        [=](int64_t i, int64_t place, int64_t channel) {
            const W value = read(values[i]);
            const W scaled = (DEGREE == 2 ? value * std::abs(value) : value) * map[place];
            write(answer[i], BIAS ? scaled + bias[channel] : scaled);
            return W(0);
        },
        [](int64_t, W) {});
}

// The gradients of scale, given its answer: of_values, and products = Σ gradient · (answer - bias) over each group, which
// is map times the gradient of map.
template <int DEGREE, bool BIAS, class T>
void scale_backward(const T *gradient, const T *answer, const WideOf<T> *map, const WideOf<T> *bias, T *of_values,
                    WideOf<T> *products, Shape shape, int threads) {
    using W = WideOf<T>;
    sweep<W>(
        shape, threads,
        [=](int64_t i, int64_t place, int64_t channel) {
            const W slope = read(gradient[i]), value = BIAS ? read(answer[i]) - bias[channel] : W(read(answer[i]));
            const W root = std::copysign(2 * std::sqrt(std::abs(value * map[place])), map[place]);
            write(of_values[i], slope * (DEGREE == 2 ? root : map[place]));
            return slope * value;
        },
        [=](int64_t place, W sum) { products[place] = sum; });
}

// target += 2 · values · map, the gradient of squares.
template <class T>
void add_squares_backward(T *target, const T *values, const WideOf<T> *map, Shape shape, int threads) {
    using W = WideOf<T>;
    sweep<W>(
        shape, threads,
        [=](int64_t i, int64_t place, int64_t) {
            write(target[i], read(target[i]) + 2 * read(values[i]) * map[place]);
            return W(0);
        },
        [](int64_t, W) {});
}

// A convolution's windows over maps of (planes, height, width, inner) elements: with channels last a plane is an image
// and inner its groups, otherwise a plane is one map and inner is 1.
struct Windows {
    int64_t planes, height, width, inner, out_height, out_width;
    int64_t kernel[2], stride[2], margin[2], dilation[2];
};

// Calls add(place, window, length, step) for each run of places of a row that lie at position `column` of the windows of a
// row; step is the distance of places whose windows are neighbours.
template <class Add> void each_shift(const Windows &w, int64_t column, Add add) {
    const int64_t shift = column * w.dilation[1] - w.margin[1], step = w.stride[1];
    const int64_t first = shift < 0 ? (-shift + step - 1) / step : 0;
    const int64_t count = (shift < w.width ? std::min(w.out_width, (w.width - 1 - shift) / step + 1) : 0) - first;
    const int64_t place = (first * step + shift) * w.inner, window = first * w.inner;
    if (count <= 0) return;
    if (step == 1) return add(place, window, count * w.inner, int64_t(1));
    if (w.inner == 1) return add(place, window, count, step);
    for (int64_t j = 0; j < count; ++j) add(place + j * step * w.inner, window + j * w.inner, w.inner, int64_t(1));
}

// answer = Σ map over each window; Σ map² if squared. First over the rows of the windows, then along the sum of these.
template <bool SQUARED, class T> void window_sum(const T *map, WideOf<T> *answer, Windows w, int threads) {
    using W = WideOf<T>;
    const int64_t length = w.width * w.inner, out_length = w.out_width * w.inner;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<W> column_sums(length);
        W *sums = column_sums.data();
#pragma omp for collapse(2)
        for (int64_t plane = 0; plane < w.planes; ++plane)
            for (int64_t row = 0; row < w.out_height; ++row) {
                std::fill_n(sums, length, W(0));
                for (int64_t k = 0; k < w.kernel[0]; ++k) {
                    const int64_t y = row * w.stride[0] - w.margin[0] + k * w.dilation[0];
                    if (y < 0 || y >= w.height) continue;
                    const T *source = map + (plane * w.height + y) * length;
#pragma omp simd
                    for (int64_t j = 0; j < length; ++j) {
                        const W value = read(source[j]);
                        sums[j] += SQUARED ? value * value : value;
                    }
                }
                W *target = answer + (plane * w.out_height + row) * out_length;
                std::fill_n(target, out_length, W(0));
                for (int64_t column = 0; column < w.kernel[1]; ++column)
                    each_shift(w, column, [=](int64_t from, int64_t to, int64_t count, int64_t step) {
                        if (step == 1)
#pragma omp simd
                            for (int64_t j = 0; j < count; ++j) target[to + j] += sums[from + j];
                        else
                            for (int64_t j = 0; j < count; ++j) target[to + j] += sums[from + j * step];
                    });
            }
    }
}

// The gradient of window_sum: of_map = Σ gradient over the windows that hold each place.
template <class W> void window_sum_backward(const W *gradient, W *of_map, Windows w, int threads) {
    const int64_t length = w.width * w.inner, out_length = w.out_width * w.inner;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<W> column_sums(out_length);
        W *sums = column_sums.data();
#pragma omp for collapse(2)
        for (int64_t plane = 0; plane < w.planes; ++plane)
            for (int64_t y = 0; y < w.height; ++y) {
                std::fill_n(sums, out_length, W(0));
                for (int64_t k = 0; k < w.kernel[0]; ++k) {
                    const int64_t down = y + w.margin[0] - k * w.dilation[0], row = down / w.stride[0];
                    if (down < 0 || down % w.stride[0] || row >= w.out_height) continue;
                    const W *source = gradient + (plane * w.out_height + row) * out_length;
#pragma omp simd
                    for (int64_t j = 0; j < out_length; ++j) sums[j] += source[j];
                }
                W *target = of_map + (plane * w.height + y) * length;
                std::fill_n(target, length, W(0));
                for (int64_t column = 0; column < w.kernel[1]; ++column)
                    each_shift(w, column, [=](int64_t to, int64_t from, int64_t count, int64_t step) {
                        if (step == 1)
#pragma omp simd
                            for (int64_t j = 0; j < count; ++j) target[to + j] += sums[from + j];
                        else
                            for (int64_t j = 0; j < count; ++j) target[to + j * step] += sums[from + j];
                    });
            }
    }
}

// Vector variants of these are in the C library; -ffast-math alone would let the compiler know, and do much else.
extern "C" {
#if defined(__x86_64__) && defined(__GLIBC__) && __GLIBC_PREREQ(2, 35)
#define VECTORISED __attribute__((__simd__("notinbranch")))
#else
#define VECTORISED
#endif
VECTORISED float asinf(float) noexcept;
VECTORISED float log1pf(float) noexcept;
VECTORISED float powf(float, float) noexcept;
VECTORISED float tanhf(float) noexcept;
VECTORISED double asin(double) noexcept;
VECTORISED double log1p(double) noexcept;
VECTORISED double pow(double, double) noexcept;
VECTORISED double tanh(double) noexcept;
}
inline float arcsine(float x) { return asinf(x); }
inline double arcsine(double x) { return asin(x); }
inline float log_of_one_plus(float x) { return log1pf(x); }
inline double log_of_one_plus(double x) { return log1p(x); }
inline float to_power(float x, float y) { return powf(x, y); }
inline double to_power(double x, double y) { return pow(x, y); }
inline float hyperbolic_tangent(float x) { return tanhf(x); }
inline double hyperbolic_tangent(double x) { return tanh(x); }

enum Magnitude { SPHERE, BALL, TANH, LINEAR_MAGNITUDE, SEG, LOG, MIX };
enum Angular { COSINE, LINEAR_ANGULAR, SQUARE_COSINE, SIGMOID, POWER };

// An operator: alpha and beta of the magnitude, the setting (k or B) of the angular function, eps of the norm.
struct Operator {
    int64_t magnitude, angular;
    double alpha, beta, setting, eps;
};

template <class W> struct Block {
    // Of each value: its norm and radius, h(n), dh/dn and dh/dρ, its cosine, g(c) and dg/dc.
    W norm[BLOCK], radius[BLOCK], h[BLOCK], h_by_norm[BLOCK], h_by_radius[BLOCK], cosine[BLOCK], g[BLOCK], slope[BLOCK];
};

// h(n) and, if SLOPES, its derivatives, as operators/magnitude.py defines them.
template <bool SLOPES, class W> void magnitudes(const Operator &op, Block<W> &b, int64_t size) {
    const W alpha = op.alpha, beta = op.beta;
#define EACH(...)                                                                                                      \
    _Pragma("omp simd") for (int64_t j = 0; j < size; ++j) {                                                           \
        const W n = b.norm[j], radius = b.radius[j];                                                                   \
        (void)n, (void)radius;                                                                                         \
        __VA_ARGS__                                                                                                    \
    }                                                                                                                  \
    break
#define ASSIGN(value, by_norm, by_radius)                                                                              \
    b.h[j] = value;                                                                                                    \
    if (SLOPES) b.h_by_norm[j] = by_norm, b.h_by_radius[j] = by_radius;
    switch (op.magnitude) {
    case SPHERE: EACH(ASSIGN(alpha, 0, 0));
    case BALL: EACH(const bool below = n < radius;
                    ASSIGN(below ? alpha * n / radius : alpha, below ? alpha / radius : 0,
                           below ? -alpha * n / (radius * radius) : 0));
    case TANH: EACH(const W t = hyperbolic_tangent(n / radius), slope = alpha * (1 - t * t) / radius;
                    ASSIGN(alpha * t, slope, -slope * n / radius));
    case LINEAR_MAGNITUDE: EACH(ASSIGN(alpha * n, alpha, 0));
    case SEG: EACH(const bool below = n < radius;
                   ASSIGN(below ? alpha * n : beta * n + (alpha - beta) * radius, below ? alpha : beta,
                          below ? 0 : alpha - beta));
    case LOG: EACH(ASSIGN(alpha * log_of_one_plus(n), alpha / (1 + n), 0));
    case MIX: EACH(ASSIGN(alpha * n + beta * log_of_one_plus(n), alpha + beta / (1 + n), 0));
    }
#undef ASSIGN
}

// g(c) and, if SLOPES, its derivative, as operators/angular.py defines them.
template <bool SLOPES, class W> void angulars(const Operator &op, Block<W> &b, int64_t size) {
    const W pi = 3.14159265358979323846, arc_scale = 1 - 1e-6, power_floor = 1e-18, setting = op.setting;
#define ASSIGN(value, derivative)                                                                                      \
    b.g[j] = value;                                                                                                    \
    if (SLOPES) b.slope[j] = derivative;
#define ELEVATION                                                                                                      \
    /* What is beyond ±1, written so that the compiler sees no branch. */                                              \
    const W beyond = std::abs(c) - 1, excess = (beyond + std::abs(beyond)) / 2;                                        \
    const W sine = (c - std::copysign(excess, c)) * arc_scale;                                                         \
    const W elevation = arcsine(sine);                                                                                 \
    const W by_cosine = arc_scale / std::sqrt(1 - sine * sine);
    switch (op.angular) {
    case COSINE: EACH(const W c = b.cosine[j]; ASSIGN(c, 1));
    case LINEAR_ANGULAR: EACH(const W c = b.cosine[j]; ELEVATION ASSIGN(elevation * (2 / pi), by_cosine * (2 / pi)));
    case SQUARE_COSINE: EACH(const W c = b.cosine[j]; ASSIGN(c * std::abs(c), 2 * std::abs(c)));
    case SIGMOID: {
        const W whole = std::tanh(pi / (4 * setting));
        EACH(const W c = b.cosine[j]; ELEVATION const W t = hyperbolic_tangent(elevation / (2 * setting));
             ASSIGN(t / whole, (1 - t * t) * by_cosine / (2 * setting * whole)));
    }
    case POWER:
        EACH(const W c = b.cosine[j], square = c * c + power_floor, ratio = to_power(square, (setting - 1) / 2);
             ASSIGN(c * ratio, ratio * (1 + (setting - 1) * c * c / square)));
    }
#undef ELEVATION
#undef ASSIGN
#undef EACH
}

// gain = h(n) / n^degree with n = sqrt(total + eps), for one radius.
template <class W>
void gain(const W *total, W radius, W *answer, int degree, Operator op, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t length = std::min(BLOCK, size - start);
        Block<W> b;
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) b.norm[j] = std::sqrt(total[start + j] + W(op.eps)), b.radius[j] = radius;
        magnitudes<false>(op, b, length);
#pragma omp simd
        for (int64_t j = 0; j < length; ++j)
            answer[start + j] = b.h[j] / (degree == 2 ? b.norm[j] * b.norm[j] : b.norm[j]);
    }
}

// The gradients of gain: of_total, and of_radius, one part for each block.
template <class W>
void gain_backward(const W *gradient, const W *total, W radius, W *of_total, W *of_radius, int degree, Operator op,
                   int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t length = std::min(BLOCK, size - start);
        Block<W> b;
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) b.norm[j] = std::sqrt(total[start + j] + W(op.eps)), b.radius[j] = radius;
        magnitudes<true>(op, b, length);
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) {
            const W n = b.norm[j], slope = gradient[start + j] / (degree == 2 ? n * n : n);
            of_total[start + j] = slope * (b.h_by_norm[j] - degree * b.h[j] / n) / (2 * n);
            b.h_by_radius[j] *= slope;
        }
        of_radius[start / BLOCK] = sum_of<W>(length, [&](int64_t j) { return b.h_by_radius[j]; });
    }
}

enum Weighting { UNWEIGHTED, LINEARLY_WEIGHTED, TANH_WEIGHTED };

// Filters of `size` weights each, multiplied by constant · weighting(‖w‖) / ‖w‖ with ‖w‖ = sqrt(Σ w² + eps).
struct Filters {
    int64_t count, size, weighting;
    double constant, eps;
};

// The factor of a filter, and its derivative by Σ w².
template <class W> void multiplier(const Filters &filters, W squares, W &factor, W &slope) {
    const W norm = std::sqrt(squares + W(filters.eps)), constant = filters.constant;
    W weighted = 1, by_norm = 0;
    if (filters.weighting == LINEARLY_WEIGHTED) weighted = norm, by_norm = 1;
    if (filters.weighting == TANH_WEIGHTED) weighted = std::tanh(norm), by_norm = 1 - weighted * weighted;
    factor = constant * weighted / norm;
    slope = constant * (by_norm - weighted / norm) / (2 * norm * norm);
}

// Σ left · right.
template <class L, class W> W inner_product(const L *left, const W *right, int64_t size) {
    return sum_of<W>(size, [=](int64_t k) { return W(read(left[k])) * right[k]; });
}

// products = weight · factor.
template <class T> void multiply_filters(const WideOf<T> *weight, T *products, Filters filters, int threads) {
    using W = WideOf<T>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t filter = 0; filter < filters.count; ++filter) {
        const W *weights = weight + filter * filters.size;
        W factor, slope;
        multiplier(filters, inner_product(weights, weights, filters.size), factor, slope);
#pragma omp simd
        for (int64_t k = 0; k < filters.size; ++k) write(products[filter * filters.size + k], weights[k] * factor);
    }
}

// of_weight, given the gradient of the products.
template <class T>
void multiply_filters_backward(const T *gradient, const WideOf<T> *weight, WideOf<T> *of_weight, Filters filters,
                               int threads) {
    using W = WideOf<T>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t filter = 0; filter < filters.count; ++filter) {
        const T *gradients = gradient + filter * filters.size;
        const W *weights = weight + filter * filters.size;
        W factor, slope;
        multiplier(filters, inner_product(weights, weights, filters.size), factor, slope);
        const W along = 2 * slope * inner_product(gradients, weights, filters.size);
#pragma omp simd
        for (int64_t k = 0; k < filters.size; ++k)
            of_weight[filter * filters.size + k] = factor * read(gradients[k]) + along * weights[k];
    }
}

// The constants of a response: one radius, or one for each channel; no factor or bias is null.
template <class W> struct Constants {
    const W *radius, *factor, *bias;
    int64_t radii;
};

// Values side by side: from `first` on, `length` of them, the first of channel `channel`.
struct Run {
    int64_t first, place, channel, length;
};

// Calls work(run) for all values of a unit, which shares no place of a map with another one.
template <class Work> void each_run_of_unit(const Shape &shape, int64_t unit, int64_t units, Work work) {
    const int64_t channels = shape.groups * shape.width;
    if (shape.inner > 1) {
        const int64_t parts = units / shape.outer, image = unit / parts, part = unit % parts;
        const int64_t begin = shape.inner * part / parts, end = shape.inner * (part + 1) / parts;
        for (int64_t channel = 0; channel < channels; ++channel)
            for (int64_t start = begin; start < end; start += BLOCK)
                work(Run{(image * channels + channel) * shape.inner + start,
                         (image * shape.groups + channel / shape.width) * shape.inner + start, channel,
                         std::min(BLOCK, end - start)});
        return;
    }
    const int64_t end = shape.outer * (unit + 1) / units, step = std::max<int64_t>(1, BLOCK / channels);
    for (int64_t pixel = shape.outer * unit / units; pixel < end; pixel += step)
        for (int64_t channel = 0; channel < channels; channel += BLOCK)
            work(Run{pixel * channels + channel, pixel * shape.groups + channel / shape.width, channel,
                     std::min(BLOCK, std::min(step, end - pixel) * channels - channel)});
}

// Calls part(first value in the run, place, length) for the values of a run that share a place; with one value for each
// place, once, for all of them.
template <class Part> void each_place(const Shape &shape, const Run &run, Part part) {
    if (shape.inner > 1 || shape.width == 1) return part(int64_t(0), run.place, run.length);
    int64_t place = run.place, length = shape.width - run.channel % shape.width;
    for (int64_t j = 0; j < run.length; j += length, length = shape.width, ++place)
        part(j, place, std::min(length, run.length - j));
}

// Calls part(first value in the run, channel, length) for the values of a run that have channels side by side; where
// they have one channel, once, for all of them.
template <class Part> void each_channel(const Shape &shape, const Run &run, Part part) {
    if (shape.inner > 1) return part(int64_t(0), run.channel, run.length);
    const int64_t channels = shape.groups * shape.width;
    for (int64_t j = 0, channel = run.channel; j < run.length; j += channels - channel, channel = 0)
        part(j, channel, std::min(channels - channel, run.length - j));
}

// Puts the constant of each value's channel into `values`.
template <class W> void spread(const Shape &shape, const Run &run, const W *constants, W *values) {
    each_channel(shape, run, [=](int64_t j, int64_t channel, int64_t length) {
        if (shape.inner > 1)
            std::fill_n(values + j, length, constants[channel]);
        else
            std::copy_n(constants + channel, length, values + j);
    });
}

// Makes the block of a run: norms, radii, h(n), cosines and g(c), with their derivatives if SLOPES.
template <bool SLOPES, class T, class W>
void evaluate(const Shape &shape, const Run &run, const T *dot, const W *total, const Constants<W> &constants,
              const Operator &op, Block<W> &b) {
    const bool single = shape.inner > 1 || shape.width == 1;
    each_place(shape, run, [&](int64_t first, int64_t place, int64_t length) {
        if (single)
#pragma omp simd
            for (int64_t j = 0; j < length; ++j) b.norm[j] = std::sqrt(total[place + j] + W(op.eps));
        else
            std::fill_n(b.norm + first, length, std::sqrt(total[place] + W(op.eps)));
    });
    if (constants.radii > 1)
        spread(shape, run, constants.radius, b.radius);
    else
        std::fill_n(b.radius, run.length, constants.radius[0]);
    magnitudes<SLOPES>(op, b, run.length);
#pragma omp simd
    for (int64_t j = 0; j < run.length; ++j) b.cosine[j] = read(dot[run.first + j]) / b.norm[j];
    angulars<SLOPES>(op, b, run.length);
}

// answer = factor · h(n) · g(dot / n) + bias with n = sqrt(total + eps).
template <class T>
void respond(const T *dot, const WideOf<T> *total, T *answer, Constants<WideOf<T>> constants, Operator op, Shape shape,
             int64_t units, int threads) {
    using W = WideOf<T>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; ++unit) {
        Block<W> b;
        W factor[BLOCK], bias[BLOCK];
        each_run_of_unit(shape, unit, units, [&](const Run &run) {
            evaluate<false>(shape, run, dot, total, constants, op, b);
#pragma omp simd
            for (int64_t j = 0; j < run.length; ++j) b.h[j] *= b.g[j];
            if (constants.factor) {
                spread(shape, run, constants.factor, factor);
#pragma omp simd
                for (int64_t j = 0; j < run.length; ++j) b.h[j] *= factor[j];
            }
            if (constants.bias) {
                spread(shape, run, constants.bias, bias);
#pragma omp simd
                for (int64_t j = 0; j < run.length; ++j) b.h[j] += bias[j];
            }
#pragma omp simd
            for (int64_t j = 0; j < run.length; ++j) write(answer[run.first + j], b.h[j]);
        });
    }
}

// The gradients of respond: of_dot, of_total, which must be 0 before, and, unless they are null, for each unit those of
// the radius and the factor of each channel, (2, units, channels), which must be 0 before, too.
template <class T>
void respond_backward(const T *gradient, const T *dot, const WideOf<T> *total, T *of_dot, WideOf<T> *of_total,
                      WideOf<T> *of_constants, Constants<WideOf<T>> constants, Operator op, Shape shape, int64_t units,
                      int threads) {
    using W = WideOf<T>;
    const int64_t channels = shape.groups * shape.width;
    const bool single = shape.inner > 1 || shape.width == 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; ++unit) {
        Block<W> b;
        W slope[BLOCK], factor[BLOCK];
        W *of_radius = of_constants + unit * channels, *of_factor = of_radius + units * channels;
        each_run_of_unit(shape, unit, units, [&](const Run &run) {
            evaluate<true>(shape, run, dot, total, constants, op, b);
#pragma omp simd
            for (int64_t j = 0; j < run.length; ++j) {
                slope[j] = read(gradient[run.first + j]);
                // From here on what the factor's gradient sums up.
                b.radius[j] = slope[j] * b.h[j] * b.g[j];
            }
            if (constants.factor) {
                spread(shape, run, constants.factor, factor);
#pragma omp simd
                for (int64_t j = 0; j < run.length; ++j) slope[j] *= factor[j];
            }
#pragma omp simd
            for (int64_t j = 0; j < run.length; ++j) {
                const W by_cosine = slope[j] * b.h[j] * b.slope[j] / b.norm[j];
                write(of_dot[run.first + j], by_cosine);
                b.norm[j] = (slope[j] * b.h_by_norm[j] * b.g[j] - by_cosine * b.cosine[j]) / (2 * b.norm[j]);
                b.h_by_radius[j] *= slope[j] * b.g[j];
            }
            each_place(shape, run, [&](int64_t first, int64_t place, int64_t length) {
                if (single) {
#pragma omp simd
                    for (int64_t j = 0; j < length; ++j) of_total[place + j] += b.norm[j];
                } else {
                    of_total[place] += sum_of<W>(length, [&](int64_t j) { return b.norm[first + j]; });
                }
            });
            if (!of_constants) return;
            each_channel(shape, run, [&](int64_t first, int64_t channel, int64_t length) {
                if (shape.inner > 1) {
                    of_radius[channel] += sum_of<W>(length, [&](int64_t j) { return b.h_by_radius[first + j]; });
                    of_factor[channel] += sum_of<W>(length, [&](int64_t j) { return b.radius[first + j]; });
                } else
#pragma omp simd
                    for (int64_t j = 0; j < length; ++j) {
                        of_radius[channel + j] += b.h_by_radius[first + j];
                        of_factor[channel + j] += b.radius[first + j];
                    }
            });
        });
    }
}

} // namespace

#define DEFINE(name, T)                                                                                                \
    extern "C" void squares_##name(const T *values, WideOf<T> *map, Shape shape, int threads) {                        \
        squares(values, map, shape, threads);                                                                          \
    }                                                                                                                  \
    extern "C" void scale_##name(const T *values, const WideOf<T> *map, const WideOf<T> *bias, T *answer, int degree,  \
                                 Shape shape, int threads) {                                                           \
        (degree == 2 ? bias ? scale<2, true, T> : scale<2, false, T>                                                   \
                     : bias ? scale<1, true, T> : scale<1, false, T>)(values, map, bias, answer, shape, threads);      \
    }                                                                                                                  \
    extern "C" void scale_backward_##name(const T *gradient, const T *answer, const WideOf<T> *map,                    \
                                          const WideOf<T> *bias, T *of_values, WideOf<T> *products, int degree,        \
                                          Shape shape, int threads) {                                                  \
        (degree == 2 ? bias ? scale_backward<2, true, T> : scale_backward<2, false, T>                                 \
                     : bias ? scale_backward<1, true, T> : scale_backward<1, false, T>)(                               \
            gradient, answer, map, bias, of_values, products, shape, threads);                                         \
    }                                                                                                                  \
    extern "C" void add_squares_backward_##name(T *target, const T *values, const WideOf<T> *map, Shape shape,         \
                                                int threads) {                                                         \
        add_squares_backward(target, values, map, shape, threads);                                                     \
    }                                                                                                                  \
    extern "C" void window_sum_##name(const T *map, WideOf<T> *answer, bool squared, Windows windows, int threads) {   \
        (squared ? window_sum<true, T> : window_sum<false, T>)(map, answer, windows, threads);                         \
    }                                                                                                                  \
    extern "C" void respond_##name(const T *dot, const WideOf<T> *total, T *answer, Constants<WideOf<T>> constants,    \
                                   Operator op, Shape shape, int64_t units, int threads) {                             \
        respond(dot, total, answer, constants, op, shape, units, threads);                                             \
    }                                                                                                                  \
    extern "C" void respond_backward_##name(const T *gradient, const T *dot, const WideOf<T> *total, T *of_dot,        \
                                            WideOf<T> *of_total, WideOf<T> *of_constants,                              \
                                            Constants<WideOf<T>> constants, Operator op, Shape shape, int64_t units,   \
                                            int threads) {                                                             \
        respond_backward(gradient, dot, total, of_dot, of_total, of_constants, constants, op, shape, units, threads);  \
    }

#define DEFINE_FOR_FILTERS(name, T)                                                                                    \
    extern "C" void multiply_filters_##name(const WideOf<T> *weight, T *products, Filters filters, int threads) {      \
        multiply_filters(weight, products, filters, threads);                                                          \
    }                                                                                                                  \
    extern "C" void multiply_filters_backward_##name(const T *gradient, const WideOf<T> *weight, WideOf<T> *of_weight, \
                                                     Filters filters, int threads) {                                   \
        multiply_filters_backward(gradient, weight, of_weight, filters, threads);                                      \
    }

DEFINE_FOR_FILTERS(float32, float)
DEFINE_FOR_FILTERS(float64, double)
DEFINE_FOR_FILTERS(bfloat16, Bfloat16)

DEFINE(float32, float)
DEFINE(float64, double)
DEFINE(bfloat16, Bfloat16)

#define DEFINE_FOR_MAPS(name, W)                                                                                       \
    extern "C" void window_sum_backward_##name(const W *gradient, W *of_map, Windows windows, int threads) {           \
        window_sum_backward(gradient, of_map, windows, threads);                                                       \
    }                                                                                                                  \
    extern "C" void gain_##name(const W *total, W *answer, const W *radius, int degree, Operator op, int64_t size,     \
                                int threads) {                                                                         \
        gain(total, *radius, answer, degree, op, size, threads);                                                       \
    }                                                                                                                  \
    extern "C" void gain_backward_##name(const W *gradient, const W *total, W *of_total, W *of_radius,                 \
                                         const W *radius, int degree, Operator op, int64_t size, int threads) {        \
        gain_backward(gradient, total, *radius, of_total, of_radius, degree, op, size, threads);                       \
    }

DEFINE_FOR_MAPS(float32, float)
DEFINE_FOR_MAPS(float64, double)
