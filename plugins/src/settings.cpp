#include "iq/settings.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "iq/kernels.h"

namespace iq
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace
{

// So that no field makes us allocate without end.
constexpr int32_t kLargestChannel = (1 << 20) - 1;

template <typename T>
int32_t lengthOf(std::vector<T> const& values)
{
    return static_cast<int32_t>(values.size());
}

template <typename To, typename From>
std::vector<To> convert(PluginField const& field)
{
    if (field.length < 0 || (field.length > 0 && field.data == nullptr))
    {
        throw std::invalid_argument("has no data, or a negative length");
    }
    std::vector<To> values;
    values.reserve(static_cast<size_t>(field.length));
    for (int32_t i = 0; i < field.length; ++i)
    {
        From value; // the data may be aligned for nothing
        std::memcpy(&value, static_cast<char const*>(field.data) + sizeof(From) * i, sizeof(From));
        values.push_back(static_cast<To>(value));
    }
    return values;
}

std::vector<float> floats(PluginField const& field)
{
    if (field.type != PluginFieldType::kFLOAT32)
    {
        throw std::invalid_argument("is not of type float");
    }
    return convert<float, float>(field);
}

// The ONNX parser hands over 32 or 64 bits, depending on its version.
std::vector<int32_t> integers(PluginField const& field)
{
    std::vector<int64_t> values;
    switch (field.type)
    {
    case PluginFieldType::kINT32: values = convert<int64_t, int32_t>(field); break;
    case PluginFieldType::kINT64: values = convert<int64_t, int64_t>(field); break;
    default: throw std::invalid_argument("is not of an integer type");
    }
    for (int64_t const value : values)
    {
        if (value < INT32_MIN || value > INT32_MAX)
        {
            throw std::invalid_argument("has a value beyond 32 bits");
        }
    }
    return {values.begin(), values.end()};
}

template <typename T>
T single(std::vector<T> const& values)
{
    if (values.size() != 1)
    {
        throw std::invalid_argument("has " + std::to_string(values.size()) + " values, not one");
    }
    return values[0];
}

// Scales and factors: their quotients and reciprocals must be ordinary numbers too.
float positive(PluginField const& field)
{
    constexpr float kLeast = 1e-15F, kMost = 1e15F;
    float const value = single(floats(field));
    if (!(value >= kLeast && value <= kMost))
    {
        throw std::invalid_argument("is not a number from 1e-15 to 1e15");
    }
    return value;
}

void readTemplates(PluginField const& field, Settings& settings)
{
    settings.templates = floats(field);
    for (float const value : settings.templates)
    {
        if (!std::isfinite(value))
        {
            throw std::invalid_argument("has a value that is not finite");
        }
    }
}

void readTemplateShape(PluginField const& field, Settings& settings)
{
    auto const shape = integers(field);
    if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1)
    {
        throw std::invalid_argument("is not [templates, hidden]");
    }
    std::copy(shape.begin(), shape.end(), settings.templateShape);
}

void readChannels(PluginField const& field, Settings& settings)
{
    settings.channels = integers(field);
    if (settings.channels.empty() || settings.channels.size() > kMostSides)
    {
        throw std::invalid_argument("is not 1 to " + std::to_string(kMostSides) + " channels");
    }
    auto sorted = settings.channels;
    std::sort(sorted.begin(), sorted.end());
    if (sorted[0] < 0 || std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    {
        throw std::invalid_argument("has a negative channel, or one twice");
    }
    if (sorted.back() > kLargestChannel)
    {
        throw std::invalid_argument("has a channel beyond " + std::to_string(kLargestChannel));
    }
}

void readThreshold(PluginField const& field, Settings& settings)
{
    settings.threshold = single(floats(field));
    if (std::isnan(settings.threshold))
    {
        throw std::invalid_argument("is not a number");
    }
}

void readEpsilon(PluginField const& field, Settings& settings)
{
    settings.epsilon = single(floats(field));
    if (!std::isfinite(settings.epsilon) || settings.epsilon < 0.0F)
    {
        throw std::invalid_argument("is negative or not finite");
    }
}

void readBlock(PluginField const& field, Settings& settings)
{
    settings.block = single(integers(field));
    bool const power = settings.block > 0 && (settings.block & (settings.block - 1)) == 0;
    if (!power || settings.block > kLargestBlock)
    {
        throw std::invalid_argument(
            "is not a power of two from 1 to " + std::to_string(kLargestBlock));
    }
}

PluginField number(char const* name, float const& value)
{
    return {name, &value, PluginFieldType::kFLOAT32, 1};
}

// What no field says alone: whether the templates have the shape.
void checkTogether(Settings const& settings)
{
    int64_t const templates = settings.templateShape[0], hidden = settings.templateShape[1];
    // Both are below 2^31: the product cannot overflow.
    if (static_cast<int64_t>(settings.templates.size()) != templates * hidden)
    {
        throw std::invalid_argument("templates has " + std::to_string(settings.templates.size())
            + " values, which is not template_shape " + std::to_string(templates) + " x "
            + std::to_string(hidden));
    }
}

FieldSpec const& findSpec(std::vector<FieldSpec const*> const& specs, char const* name)
{
    for (FieldSpec const* const spec : specs)
    {
        if (name != nullptr && std::strcmp(spec->name, name) == 0)
        {
            return *spec;
        }
    }
    throw std::invalid_argument(
        std::string("field '") + (name == nullptr ? "(no name)" : name) + "' is unknown");
}

} // namespace

FieldSpec const kTemplates{"templates", PluginFieldType::kFLOAT32, readTemplates,
    [](Settings const& s) {
        return PluginField("templates", s.templates.data(), PluginFieldType::kFLOAT32,
            lengthOf(s.templates));
    }};

FieldSpec const kTemplateShape{"template_shape", PluginFieldType::kINT32, readTemplateShape,
    [](Settings const& s) {
        return PluginField("template_shape", s.templateShape, PluginFieldType::kINT32, 2);
    }};

FieldSpec const kChannels{"channels", PluginFieldType::kINT32, readChannels,
    [](Settings const& s) {
        return PluginField(
            "channels", s.channels.data(), PluginFieldType::kINT32, lengthOf(s.channels));
    }};

FieldSpec const kThreshold{"threshold", PluginFieldType::kFLOAT32, readThreshold,
    [](Settings const& s) { return number("threshold", s.threshold); }};

FieldSpec const kEpsilon{"epsilon", PluginFieldType::kFLOAT32, readEpsilon,
    [](Settings const& s) { return number("epsilon", s.epsilon); }};

FieldSpec const kScale{"scale", PluginFieldType::kFLOAT32,
    [](PluginField const& field, Settings& s) { s.scale = positive(field); },
    [](Settings const& s) { return number("scale", s.scale); }};

FieldSpec const kFactor{"factor", PluginFieldType::kFLOAT32,
    [](PluginField const& field, Settings& s) { s.factor = positive(field); },
    [](Settings const& s) { return number("factor", s.factor); }};

FieldSpec const kBlock{"block", PluginFieldType::kINT32, readBlock, [](Settings const& s) {
                           return PluginField("block", &s.block, PluginFieldType::kINT32, 1);
                       }};

std::shared_ptr<Settings const> readSettings(std::vector<FieldSpec const*> const& specs,
    std::string node, PluginFieldCollection const* collection)
{
    if (collection == nullptr || collection->nbFields < 0
        || (collection->nbFields > 0 && collection->fields == nullptr))
    {
        throw std::invalid_argument("there is no collection of fields");
    }
    auto settings = std::make_shared<Settings>();
    settings->node = std::move(node);
    std::vector<FieldSpec const*> seen;
    for (int32_t i = 0; i < collection->nbFields; ++i)
    {
        PluginField const& field = collection->fields[i];
        FieldSpec const& spec = findSpec(specs, field.name);
        std::string const name = std::string("field '") + spec.name + "' ";
        if (std::find(seen.begin(), seen.end(), &spec) != seen.end())
        {
            throw std::invalid_argument(name + "is there twice");
        }
        seen.push_back(&spec);
        try
        {
            spec.read(field, *settings);
        }
        catch (std::invalid_argument const& error)
        {
            throw std::invalid_argument(name + error.what());
        }
    }
    for (FieldSpec const* const spec : specs)
    {
        if (std::find(seen.begin(), seen.end(), spec) == seen.end())
        {
            throw std::invalid_argument(std::string("field '") + spec->name + "' is missing");
        }
    }
    checkTogether(*settings);
    // Who quantizes what is inserted needs its codes alone.
    bool const quantizes = std::find(specs.begin(), specs.end(), &kScale) != specs.end();
    settings->device = !settings->channels.empty() ? slotBytes(settings->channels)
        : quantizes                                ? codeBytes(settings->templates, settings->scale)
                                                   : bytesOf(settings->templates);
    for (FieldSpec const* const spec : specs)
    {
        settings->fields.push_back(spec->write(*settings));
    }
    settings->collection.nbFields = lengthOf(settings->fields);
    settings->collection.fields = settings->fields.data();
    return settings;
}

} // namespace iq
