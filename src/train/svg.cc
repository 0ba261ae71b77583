#include "train/svg.h"

#include <fmt/format.h>

#include <iterator>

namespace mamba3 {

namespace {

std::string escaped(std::string_view words) {
  std::string text;
  for (const char c : words) {
    switch (c) {
      case '&':
        text += "&amp;";
        break;
      case '<':
        text += "&lt;";
        break;
      case '>':
        text += "&gt;";
        break;
      default:
        text += c;
    }
  }
  return text;
}

const char* name_of(Svg::Anchor anchor) {
  return anchor == Svg::Anchor::start ? "start" : anchor == Svg::Anchor::end ? "end" : "middle";
}

}  // namespace

Svg::Svg(double width, double height) {
  body_ = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:g} {1:g}\" "
      "font-family=\"sans-serif\" font-size=\"13\">\n"
      "<rect width=\"{0:g}\" height=\"{1:g}\" fill=\"white\"/>\n",
      width, height);
}

void Svg::rectangle(double x, double y, double width, double height, std::string_view colour) {
  fmt::format_to(std::back_inserter(body_),
                 "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
                 "fill=\"{}\"/>\n",
                 x, y, width, height, colour);
}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view colour) {
  path({{x1, y1}, {x2, y2}}, colour);
}

void Svg::path(const std::vector<std::pair<double, double>>& points, std::string_view colour,
               bool dashed) {
  std::string d;
  for (const auto& [x, y] : points) {
    d += fmt::format("{}{:.1f} {:.1f}", d.empty() ? 'M' : 'L', x, y);
  }
  fmt::format_to(std::back_inserter(body_), "<path d=\"{}\" fill=\"none\" stroke=\"{}\"{}/>\n", d,
                 colour, dashed ? " stroke-dasharray=\"4 3\"" : "");
}

void Svg::circle(double x, double y, double radius, std::string_view colour) {
  fmt::format_to(std::back_inserter(body_),
                 "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{:g}\" fill=\"{}\"/>\n", x, y, radius,
                 colour);
}

void Svg::text(double x, double y, std::string_view words, Anchor anchor, std::string_view colour,
               bool bold) {
  fmt::format_to(std::back_inserter(body_),
                 "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" fill=\"{}\"{}>{}</text>\n", x,
                 y, name_of(anchor), colour, bold ? " font-weight=\"bold\"" : "", escaped(words));
}

std::string Svg::finish() const {
  return body_ + "</svg>\n";
}

}  // namespace mamba3
