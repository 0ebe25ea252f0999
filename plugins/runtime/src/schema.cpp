#include "schema.h"

#include <algorithm>
#include <map>
#include <regex>

#include <nlohmann/json.hpp>

#include "manifest_schema.h"

namespace iq
{
namespace
{

constexpr size_t kShown = 60;

// The schema, and its patterns, compiled once.
struct Schema
{
    Json root = Json::parse(kManifestSchema);
    std::map<std::string, std::regex> patterns;

    Schema()
    {
        for (Json const& part : root["$defs"])
        {
            if (part.contains("pattern"))
            {
                auto const& text = part["pattern"].get_ref<std::string const&>();
                patterns.emplace(text, std::regex(text, std::regex::ECMAScript));
            }
        }
    }
};

Schema const& manifestSchema()
{
    static Schema const schema;
    return schema;
}

bool isOfType(Json const& value, std::string const& type)
{
    return (type == "object" && value.is_object()) || (type == "array" && value.is_array())
        || (type == "string" && value.is_string()) || (type == "boolean" && value.is_boolean())
        || (type == "integer" && value.is_number_integer())
        || (type == "number" && value.is_number()) || (type == "null" && value.is_null());
}

std::string nameOf(std::string const& type)
{
    static std::map<std::string, std::string> const kNames{{"object", "an object"},
        {"array", "a list"}, {"string", "a text"}, {"integer", "an integer"},
        {"number", "a number"}, {"boolean", "true or false"}, {"null", "null"}};
    return kNames.at(type);
}

std::string shown(std::string text)
{
    if (text.size() > kShown)
    {
        size_t end = kShown;
        while ((static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U)
        {
            --end; // not inside a character
        }
        text = text.substr(0, end) + "...";
    }
    return "'" + text + "'";
}

void checkType(Node const& node, Json const& types)
{
    std::string names;
    for (Json const& type : types.is_array() ? types : Json::array({types}))
    {
        auto const& name = type.get_ref<std::string const&>();
        if (isOfType(node.json(), name))
        {
            return;
        }
        names += (names.empty() ? "" : " or ") + nameOf(name);
    }
    node.refuse("is not " + names);
}

void checkText(Node const& node, std::string const& text, Json const& schema)
{
    auto const inside = [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; };
    auto const length = text.size()
        - static_cast<size_t>(std::count_if(text.begin(), text.end(), inside));
    // Shortest first: std::regex needs stack for each letter.
    bool const fits = !schema.contains("maxLength") || length <= schema["maxLength"].get<size_t>();
    if (!fits
        || (schema.contains("pattern")
            && !std::regex_match(
                text, manifestSchema().patterns.at(schema["pattern"].get<std::string>()))))
    {
        node.refuse(shown(text) + " is not " + schema["title"].get<std::string>());
    }
}

void check(Node const& node, Json const& schema);

void checkMembers(Node const& node, Json const& schema)
{
    if (schema.contains("required"))
    {
        for (Json const& name : schema["required"])
        {
            if (!node.json().contains(name.get_ref<std::string const&>()))
            {
                node.refuse("has no '" + name.get<std::string>() + "'");
            }
        }
    }
    Json const none = Json::object();
    Json const& known = schema.contains("properties") ? schema["properties"] : none;
    Json const& others
        = schema.contains("additionalProperties") ? schema["additionalProperties"] : none;
    node.eachMember([&](std::string const& name, Node const& member) {
        if (schema.contains("propertyNames"))
        {
            Json const key = name;
            check({key, node.where()}, schema["propertyNames"]);
        }
        if (known.contains(name))
        {
            check(member, known[name]);
        }
        else if (others.is_boolean())
        {
            node.refuse("has the unknown field " + shown(name));
        }
        else
        {
            check(member, others);
        }
    });
}

// The keywords that the schema uses; tests/bundle/test_schema.py looks for others.
void check(Node const& node, Json const& schema)
{
    Json const& value = node.json();
    if (schema.contains("$ref"))
    {
        std::string const reference = schema["$ref"].get<std::string>();
        check(node, manifestSchema().root["$defs"][reference.substr(reference.rfind('/') + 1)]);
        return;
    }
    if (schema.contains("type"))
    {
        checkType(node, schema["type"]);
    }
    if (schema.contains("const") && value != schema["const"])
    {
        node.refuse("is not " + schema["const"].dump());
    }
    if (schema.contains("enum"))
    {
        Json const& words = schema["enum"];
        if (std::find(words.begin(), words.end(), value) == words.end())
        {
            node.refuse("is " + (value.is_string() ? shown(value.get<std::string>()) : "no text")
                + ", which is not known");
        }
    }
    if (value.is_string())
    {
        checkText(node, value.get_ref<std::string const&>(), schema);
    }
    else if (value.is_number_integer() && schema.contains("maximum"))
    {
        static_cast<void>(
            node.integer(schema["minimum"].get<int64_t>(), schema["maximum"].get<int64_t>()));
    }
    else if (value.is_array() && schema.contains("items"))
    {
        if (schema.contains("maxItems")
            && (value.size() < schema["minItems"].get<size_t>()
                || value.size() > schema["maxItems"].get<size_t>()))
        {
            node.refuse(
                "is not a list of " + schema["minItems"].dump() + " to " + schema["maxItems"].dump());
        }
        node.eachItem([&schema](Node const& item) { check(item, schema["items"]); });
    }
    else if (value.is_object())
    {
        checkMembers(node, schema);
    }
}

} // namespace

void checkManifest(Node const& manifest)
{
    check(manifest, manifestSchema().root);
}

} // namespace iq
